# SPDX-License-Identifier: Apache-2.0
"""What a module's hooks leave for what runs inside its forward, per thread.

transformers' attention call has no argument for a decision, and not every attention module forwards unknown keyword
arguments. A hook and what it hooks always run in one thread, also when a checkpointed layer is recomputed in a backward
thread, so values left here never meet those of another forward. A `threading.local` rather than a context variable:
torch.compile traces the former.
"""

import threading
from typing import Any

_LOCAL = threading.local()


def put(owner: Any, value: Any) -> None:
    """Leave a value for an owner (a module, or a name) in this thread."""
    _LOCAL.__dict__.setdefault("staged", {})[owner] = value


def get(owner: Any) -> Any:
    """What was left for an owner in this thread, or None."""
    return _LOCAL.__dict__.setdefault("staged", {}).get(owner)


def take(owner: Any) -> Any:
    """As `get`; it is not held any longer."""
    return _LOCAL.__dict__.setdefault("staged", {}).pop(owner, None)
