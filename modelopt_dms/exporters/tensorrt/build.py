# SPDX-License-Identifier: Apache-2.0
"""Builds the TensorRT engines of an exported directory, on the GPU that will run them.

Both engines are built before the first file is replaced; the manifest is written last.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from modelopt_dms.config.output_dir import atomic_file
from modelopt_dms.runtime.checks import check_files, check_kernels, check_pages, kernel_hashes
from modelopt_dms.runtime.gpu import Gpu
from modelopt_dms.runtime.manifest import EngineError, Manifest, ManifestError, Phase
from modelopt_dms.runtime.state import shape_of
from modelopt_dms.runtime.tensorrt import check_machine, import_tensorrt, make_log

Sizes = tuple[int, int, int]  # min, opt, max


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for.

    Attributes:
        batch: batch slots of the decode step.
        pages: of each layer that can be given out at most; None: as many as all its lists can own.
        workspace: bytes that TensorRT may use for scratch; None: its default.
        timing_cache: file that is read if it exists, and written.
    """

    batch: int = 8
    pages: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "pages", "workspace"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError(f"{name}={value} must be 1 or more")

    def most_pages(self, manifest: Manifest) -> int:
        """Pages of each layer that can be given out."""
        if self.pages is None:
            return manifest.all_pages(self.batch)
        check_pages(self.pages, manifest)
        return self.pages


def build(
    directory: str | Path,
    options: BuildOptions | None = None,
    *,
    gpu: Gpu | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Build the engines and write them beside the graphs.

    Args:
        directory: that was exported.
        options: what they are built for.
        gpu: that will run them.
        on_progress: is told what is being done.

    Returns:
        The manifest, with the engines.

    Raises:
        ManifestError: files are missing or changed.
        EngineError: TensorRT or the GPU are missing or do not fit, or TensorRT refuses a graph.
    """
    directory = Path(directory)
    options = options or BuildOptions()
    manifest = Manifest.load(directory)
    pages = options.most_pages(manifest)
    check_files(manifest, directory)
    if not manifest.plugin_free:
        check_kernels(manifest, directory)
    for phase in manifest.phases.values():
        if not (directory / phase.graph).is_file():
            raise ManifestError(f"{directory / phase.graph} is missing; export again")
    needs = [
        import_tensorrt,
        lambda: gpu or Gpu(),
        *([] if manifest.plugin_free else [import_onnx]),
    ]
    trt, gpu, *_ = check_machine(needs)
    check_arch(manifest, gpu)
    if not manifest.plugin_free:
        from modelopt_dms.exporters.tensorrt.plugins import register

        register(manifest, directory)
    builder = _Builder(trt, manifest, directory, options, pages)
    began = time.perf_counter()
    plans = {}
    for name in manifest.phases:
        on_progress(
            f"building the {name} engine with TensorRT {trt.__version__}; this takes minutes"
        )
        plans[name] = builder.plan(name)
    engines = {name: f"{name}.engine" for name in plans}
    for name, plan in plans.items():
        with atomic_file(directory / engines[name]) as temporary:
            temporary.write_bytes(plan)
    machine = {
        "tensorrt": trt.__version__,
        "gpu": gpu.name,
        "capability": gpu.capability,
        "batch": options.batch,
        "pages": pages,
        "kernels": kernel_hashes(manifest.kernels),
        "seconds": round(time.perf_counter() - began, 1),
    }
    built = manifest.with_engines(engines, directory, machine)
    built.save(directory)
    return built


def check_arch(manifest: Manifest, gpu: Gpu) -> None:
    """That the kernels were compiled for this GPU.

    Raises:
        EngineError: they were not.
    """
    here = int(gpu.capability.replace(".", ""))
    for kernel in manifest.kernels:
        number = kernel.arch.removeprefix("sm_")
        # "90a" is for that one only; plain PTX is for all that came later, too.
        fits = here == int(number[:-1]) if number[-1].isalpha() else here >= int(number)
        if not fits:
            raise EngineError(
                f"wrong GPU: the kernel of {kernel.operator} was compiled for {kernel.arch}, and this {gpu.name} has "
                f"compute capability {gpu.capability}; `modelopt-dms export --format tensorrt --plugin-free` writes "
                "graphs without such kernels, for any GPU"
            )


def graph_bytes(manifest: Manifest, path: Path) -> bytes:
    """A graph as TensorRT parses it, without the weights beside it."""
    if manifest.plugin_free:
        return path.read_bytes()
    onnx = import_onnx()
    from modelopt_dms.exporters.tensorrt.graph import plugin_variant

    model = onnx.load(str(path), load_external_data=False)
    return plugin_variant(model).SerializeToString()


def import_onnx() -> ModuleType:
    """The module that reads graphs.

    Raises:
        EngineError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise EngineError(
            "onnx is not installed, which the build reads graphs with; `pip install 'modelopt-dms[onnx]'`"
        ) from error
    return onnx


class _Builder:
    """What both engines are built with."""

    def __init__(
        self,
        trt: ModuleType,
        manifest: Manifest,
        directory: Path,
        options: BuildOptions,
        pages: int,
    ) -> None:
        self._trt = trt
        self._manifest = manifest
        self._directory = directory
        self._options = options
        self._pages = pages
        self._log = make_log(trt)
        self._builder = trt.Builder(self._log)

    def plan(self, name: str) -> Any:
        """The serialized engine of a phase."""
        phase = self._manifest.phases[name]
        trt = self._trt
        # Ignored by TensorRT 11, where there is nothing else; 10 needs it.
        strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._builder.create_network(strong)
        self._parse(network, phase)
        if self._manifest.plugin_free:
            _let_decompose(trt, network)
        config = self._config()
        config.add_optimization_profile(self._profile(phase, name))
        cache = self._load_cache(config)
        plan = self._builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(
                f"TensorRT cannot build an engine of {phase.graph}: {self._log.text()}"
            )
        if cache is not None:
            with atomic_file(cache) as temporary:
                temporary.write_bytes(config.get_timing_cache().serialize())
        return plan

    def _parse(self, network: Any, phase: Phase) -> None:
        """Read a graph into a network; weights come from the file beside it."""
        path = self._directory / phase.graph
        parser = self._trt.OnnxParser(network, self._log)
        if parser.parse(graph_bytes(self._manifest, path), str(path)):
            return
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(f"{x.node_name()}: {x.desc()}" for x in errors[:3])
        raise EngineError(
            f"TensorRT cannot parse {phase.graph} ({len(errors)} errors): {said or self._log.text()}"
        )

    def _config(self) -> Any:
        trt, options = self._trt, self._options
        config = self._builder.create_builder_config()
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if not self._manifest.plugin_free:
            config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.NONE
        return config

    def _profile(self, phase: Phase, name: str) -> Any:
        """Shapes: all fixed but the number of pages, which memory decides when the engine is loaded."""
        batch = self._options.batch if name == "decode" else 1
        # One page more than can be given out.
        pages: Sizes = (self._manifest.model.kv_heads + 1, self._pages + 1, self._pages + 1)
        profile = self._builder.create_optimization_profile()
        for port in phase.inputs:
            profile.set_shape(port.name, *(shape_of(port, batch, x) for x in pages))
        return profile

    def _load_cache(self, config: Any) -> Path | None:
        """Give a configuration what is known about times; the file it came from."""
        path = self._options.timing_cache
        if path is not None:
            known = path.read_bytes() if path.is_file() else b""
            if not config.set_timing_cache(config.create_timing_cache(known), False):
                # Of another TensorRT or GPU: start anew, the file will be replaced.
                config.set_timing_cache(config.create_timing_cache(b""), False)
        return path


def _let_decompose(trt: ModuleType, network: Any) -> None:
    """Allow attention to become other layers where TensorRT has no kernel for its dims, its dtype or this GPU."""
    attention = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)  # from TensorRT 10.14 on
    for index in range(network.num_layers if attention is not None else 0):
        layer = network.get_layer(index)
        if layer.type == attention:
            # How TensorRT's Python API casts a layer to its own class.
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
