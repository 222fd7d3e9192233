# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in exports."""


class ExportError(ValueError):
    """An export that cannot be made; the message says why."""
