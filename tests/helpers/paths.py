# SPDX-License-Identifier: Apache-2.0
"""Where things of this repository are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = Path(__file__).parent
EMBEDDED = ROOT / "examples" / "embedded_model"
