# SPDX-License-Identifier: Apache-2.0
"""Scripts of this repository as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from paths import ROOT


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    # As when it is run: what lies beside a script can be imported.
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module
