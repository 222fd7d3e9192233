# SPDX-License-Identifier: Apache-2.0
"""Puts the weights of a new export into engines that were built of an older one, in seconds. Knows no model.

For gates that were tuned again and models that were trained on: the graphs are the same and only numbers differ. What
an engine cannot take is refused before a file changes: TensorRT may have folded a weight into something else.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from modelopt_dms.engine.checks import check_engine, check_files, check_kernels
from modelopt_dms.engine.errors import EngineError
from modelopt_dms.engine.gpu import Gpu
from modelopt_dms.engine.manifest import FILE, Manifest, ManifestError, sha256
from modelopt_dms.engine.tensorrt import import_tensorrt, make_log
from modelopt_dms.exporters.tensorrt.build import graph_bytes, import_onnx
from modelopt_dms.output import check_output, staged

# Of the model, what the graphs do not hold: it may be another one.
FREE = ("eos",)


def refit(
    directory: str | Path,
    source: str | Path,
    output: str | Path | None = None,
    *,
    gpu: Gpu | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Make engines with the weights of another export of the same architecture.

    Args:
        directory: with engines that were built with `refit`.
        source: that was exported with the new weights.
        output: new or empty, gets the new export and its engines; None: they replace those of `directory`.
        gpu: that the engines were built on.
        say: is told what is being done.

    Returns:
        The manifest of the new weights, with the engines.

    Raises:
        ManifestError: files are missing or changed, or the two directories hold different models.
        EngineError: TensorRT, the GPU or the engines are missing or do not fit, or an engine cannot take a weight.
        OutputError: `output` cannot be written to without losing something.
    """
    directory, source = Path(directory), Path(source)
    old, new = Manifest.load(directory), Manifest.load(source)
    if source.resolve() == directory.resolve():
        raise EngineError(f"{source} is the directory of the engines itself; export to another one")
    check_same(old, new)
    check_files(old, directory)
    check_files(new, source)
    check_kernels(new, source)
    target = directory if output is None else check_output(output)
    import_onnx()
    trt = import_tensorrt()
    check_engine(old, directory, trt.__version__, (gpu or Gpu()).capability)
    build = old.build or {}
    if not build["refit"]:
        raise EngineError(
            f"the engines of {directory} hold their weights for good; build them with --refit"
        )
    began = time.perf_counter()
    refitter = _Refitter(trt, old, directory, source)
    changed: set[str] = set()
    plans = {}
    for name, phase in old.phases.items():
        say(f"new weights for the {name} engine")
        plans[str(phase.engine)], found = refitter.plan(name)
        changed |= found
    facts = {
        **build,
        "refit": refitter.again,
        "refitted": len(changed),
        "weights": {x.name: sha256(x) for x in sorted(source.glob("*.bin"))},
        "seconds": round(time.perf_counter() - began, 1),
    }
    engines = {name: str(phase.engine) for name, phase in old.phases.items()}
    if target == directory:
        return _publish(directory, source, new, plans, engines, facts)
    with staged(target) as place:
        return _publish(place, source, new, plans, engines, facts)


def check_same(old: Manifest, new: Manifest) -> None:
    """That engines of one export can take the weights of the other.

    Raises:
        ManifestError: names the first field that differs.
    """
    pairs: list[tuple[str, Any, Any]] = [
        (f"model.{x}", y, asdict(new.model)[x]) for x, y in asdict(old.model).items()
    ]
    sizes = ("page", "pages_per_list", "chunk", "programs", "plugin_free")
    pairs += [(x, getattr(old, x), getattr(new, x)) for x in sizes]
    for name in sorted({*old.phases, *new.phases}):
        phases = [x.phases.get(name) for x in (old, new)]
        was, now = [x and replace(x, engine=None, engine_sha256=None) for x in phases]
        pairs.append((f"phases.{name}", was, now))
    for field, was, now in pairs:
        if was != now and field.removeprefix("model.") not in FREE:
            values = "" if field.startswith("phases") else f" is {was!r} and {now!r}"
            raise ManifestError(
                f"the engines are of another model than the new export: {field}{values or ' differ'}; "
                "build engines of the new export"
            )
    for x in sorted({y.operator for y in (*old.kernels, *new.kernels)}):
        kernels = [[y for y in z.kernels if y.operator == x] for z in (old, new)]
        if kernels[0] != kernels[1]:
            raise ManifestError(
                f"the kernel of {x} is another one in the new export, and engines embed theirs; build engines of the "
                "new export"
            )


class _Refitter:
    """What both engines get their weights with.

    Attributes:
        again: whether the new engines can be refitted, too.
    """

    def __init__(self, trt: ModuleType, manifest: Manifest, directory: Path, source: Path) -> None:
        self._trt, self._manifest = trt, manifest
        self._directory, self._source = directory, source
        self._log = make_log(trt)
        self._runtime = trt.Runtime(self._log)
        self.again = True

    def plan(self, name: str) -> tuple[Any, set[str]]:
        """The serialized engine of a phase with its new weights, and which of them differ from the old ones."""
        from modelopt_dms.exporters.tensorrt.weights import changed_weights

        phase = self._manifest.phases[name]
        path = self._source / phase.graph
        for x in (self._directory / phase.graph, path):
            if not x.is_file():
                raise ManifestError(f"{x} is missing; export again")
        changed = changed_weights(self._directory / phase.graph, path)
        engine = self._load((self._directory / str(phase.engine)).read_bytes(), str(phase.engine))
        if not engine.refittable:
            raise EngineError(
                f"TensorRT says that {phase.engine} cannot be refitted; build it again"
            )
        self._fill(engine, path, changed)
        plan = self._serialize(engine)
        del engine  # its memory, before the new one is loaded
        # An engine that cannot be loaded must not replace one that can.
        self.again &= self._load(plan, f"{phase.engine} with its new weights").refittable
        return plan, changed

    def _load(self, plan: Any, what: str) -> Any:
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"TensorRT cannot load {what}: {self._log.text()}")
        return engine

    def _fill(self, engine: Any, path: Path, changed: set[str]) -> None:
        """Give an engine all weights of a graph."""
        refitter = self._trt.Refitter(engine, self._log)
        fixed = sorted(changed - set(refitter.get_all_weights()))
        if fixed:
            raise EngineError(
                f"{len(fixed)} weights of {path.name} that differ cannot be replaced, TensorRT folded them into "
                f"others: {', '.join(fixed[:3])}; build engines of the new export"
            )
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_bytes(graph_bytes(self._manifest, path), str(path)):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise EngineError(
                f"TensorRT cannot take the weights of {path.name}: {'; '.join(errors[:3]) or self._log.text()}"
            )
        missing = refitter.get_missing_weights()
        if missing:
            raise EngineError(
                f"{path.name} lacks {len(missing)} weights that the engine needs: {', '.join(missing[:3])}; "
                "build engines of the new export"
            )
        if not refitter.refit_cuda_engine():
            raise EngineError(f"TensorRT refuses the weights of {path.name}: {self._log.text()}")

    def _serialize(self, engine: Any) -> Any:
        flags = self._trt.SerializationFlag
        config = engine.create_serialization_config()
        config.clear_flag(flags.EXCLUDE_WEIGHTS)
        # Older ones lack it; what they wrote is asked whether it can be refitted.
        keep = getattr(flags, "INCLUDE_REFIT", None)
        if keep is not None:
            config.set_flag(keep)
        plan = engine.serialize_with_config(config)
        if plan is None:
            raise EngineError(f"TensorRT cannot serialize the engine: {self._log.text()}")
        return plan


def _publish(
    place: Path,
    source: Path,
    new: Manifest,
    plans: dict[str, Any],
    engines: dict[str, str],
    facts: dict[str, Any],
) -> Manifest:
    """Write an export and its engines, the manifest last; what they replace stays until everything lies beside it."""
    files = [x.relative_to(source) for x in sorted(source.rglob("*")) if x.is_file()]
    files = [x for x in files if x.name != FILE and x.suffix != ".engine" and x.name[0] != "."]
    pending = {place / x: source / x for x in files}
    try:
        for path, origin in pending.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, _beside(path))
        for name, plan in plans.items():
            _beside(place / name).write_bytes(plan)
        for path in [*pending, *(place / x for x in plans)]:
            os.replace(_beside(path), path)
    finally:
        for path in [*pending, *(place / x for x in plans)]:
            _beside(path).unlink(missing_ok=True)
    built = new.with_engines(engines, place, facts)
    built.save(place)
    return built


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.refit")
