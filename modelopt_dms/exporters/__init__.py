# SPDX-License-Identifier: Apache-2.0
"""What a compressed model is written as, for those who serve it."""

from modelopt_dms.exporters.hf import RECIPE_FILE, ExportError, export

__all__ = ["RECIPE_FILE", "ExportError", "export"]
