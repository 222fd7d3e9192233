# SPDX-License-Identifier: Apache-2.0
"""What goes wrong before or while an engine runs. Knows nothing else."""


class EngineError(ValueError):
    """An engine that cannot be built, loaded or asked; the message says why, and what to do."""
