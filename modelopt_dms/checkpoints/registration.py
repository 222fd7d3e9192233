# SPDX-License-Identifier: Apache-2.0
"""Tells transformers and ModelOpt about DMS as soon as each is imported. Imports neither: that would take seconds."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# What is imported by others, and the module of ours that then registers what it needs to know.
ENTRIES = {
    "transformers.conversion_mapping": ("modelopt_dms.checkpoints.lost_gates",),
    "transformers.quantizers.auto": ("modelopt_dms.checkpoints.hf_quantizer",),
    "modelopt.torch": (
        "modelopt_dms.modeling.modelopt_mode",
        "modelopt_dms.quantization.nvfp4_backend",
        "modelopt_dms.quantization.foreign",
    ),
}


def register_when_imported() -> None:
    """Register now where the other library is imported already, else right after it has been."""
    waiting = {x: ours for x, ours in ENTRIES.items() if x not in sys.modules}
    for library in ENTRIES.keys() - waiting.keys():
        for ours in ENTRIES[library]:
            import_module(ours)
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


class _Finder(MetaPathFinder):
    """Finds nothing by itself: what other finders find is loaded by `_Loader`."""

    def __init__(self, waiting: dict[str, tuple[str, ...]]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec: ModuleSpec | None = find(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self.waiting[fullname])
                return spec
        return None


class _Loader(Loader):
    """Loads a module as its own loader does, then imports our part."""

    def __init__(self, loader: Any, ours: tuple[str, ...]) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # inspect and importlib.resources ask a module for its loader.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        for ours in self.ours:
            import_module(ours)
