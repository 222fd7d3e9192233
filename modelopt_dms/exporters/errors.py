# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in exports. Needs nothing, so that those who build engines need neither torch nor transformers."""


class ExportError(ValueError):
    """An export that cannot be made; the message says why."""
