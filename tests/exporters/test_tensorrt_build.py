# SPDX-License-Identifier: Apache-2.0
"""Building and running TensorRT engines, against a double that has the surface of the real bindings."""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensorrt_double import Double, FakeGpu, World
from tensorrt_surface import surface
from toy_engine import ToyBackend, ToyGraphs, toy_manifest

from modelopt_dms.exporters.tensorrt.build import BuildOptions, build
from modelopt_dms.runtime.manifest import EngineError, Kernel, Manifest, sha256
from modelopt_dms.runtime.operators import DOMAIN
from modelopt_dms.runtime.session import Session
from modelopt_dms.runtime.tensorrt import TensorRTBackend, make_log

onnx = pytest.importorskip("onnx")
if importlib.util.find_spec("tensorrt_bindings") is None:
    pytest.skip("needs the tensorrt-cu13-bindings wheel (Linux)", allow_module_level=True)

GPU: Any = FakeGpu()
OLD = "TENSORRT_10_BINDINGS"  # a directory with the bindings of TensorRT 10.10, the oldest that we take


@pytest.fixture(params=["installed", pytest.param("10.10", marks=pytest.mark.tensorrt)])
def real(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The surface of the bindings."""
    if request.param == "installed":
        return surface()
    if OLD not in os.environ:
        pytest.skip(f"{OLD} names no directory: make test-tensorrt")
    found = surface(os.environ[OLD])
    assert found["version"].startswith("10.10.")
    return found


def graph(*types: str) -> Any:
    """A graph with a node of ours for each type, one of them in a branch, and functions of two domains."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(n, floats, [1]) for n in "xy")
    ours = [helper.make_node(t, ["x"], [f"y{i}"], domain=DOMAIN) for i, t in enumerate(types)]
    inner = helper.make_graph(ours[:1], "branch", [], [])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    nodes = [*ours[1:], branch, helper.make_node("Other", ["x"], ["z"], domain="else.where")]
    opset = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    opset.append(helper.make_opsetid("else.where", 1))
    body = [helper.make_node("Identity", ["a"], ["b"])]
    functions = [
        helper.make_function(domain, name, ["a"], ["b"], body, opset[:1])
        for domain, name in ((DOMAIN, "DmsCacheUpdate"), ("else.where", "Other"))
    ]
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=opset, functions=functions
    )


def exported(place: Path, manifest: Manifest | None = None, kernels: bool = True) -> Manifest:
    """A directory as an export leaves it, its graphs stand-ins."""
    manifest = manifest or toy_manifest()
    if kernels:
        (place / "kernels").mkdir()
        path = place / "kernels" / "update.ptx"
        path.write_text(".version 8.3\n")
        kernel = Kernel(
            "DmsCacheUpdate",
            "kernels/update.ptx",
            "update",
            sha256(path),
            "sm_90a",
            128,
            0,
            ("B * K", "1", "1"),
            ("B",),
        )
        manifest = dataclasses.replace(manifest, kernels=(kernel,))
    for phase in manifest.phases.values():
        onnx.save(graph("DmsCacheUpdate", "DmsDecodePartial"), str(place / phase.graph))
    manifest.save(place)
    return manifest


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Manifest, Path]]:
    """What the plugins' module was asked to register."""
    asked: list[tuple[Manifest, Path]] = []
    module = ModuleType("plugins")
    module.register = lambda *args: asked.append(args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelopt_dms.exporters.tensorrt.plugins", module)
    return asked


def use(monkeypatch: pytest.MonkeyPatch, real: dict[str, Any], manifest: Manifest) -> World:
    world = World(real, manifest, ToyGraphs(manifest))
    monkeypatch.setitem(sys.modules, "tensorrt", world.double.module)
    return world


def test_a_build_calls_what_the_bindings_have(
    real: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registered: list[tuple[Manifest, Path]],
) -> None:
    manifest = exported(tmp_path)
    world = use(monkeypatch, real, manifest)
    cache = tmp_path / "times"
    options = BuildOptions(3, 20, 1 << 20, timing_cache=cache)
    built = build(tmp_path, options, gpu=GPU)
    calls = world.double

    module = calls.module
    strong = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # type: ignore[attr-defined]
    assert calls.named("Builder.create_network") == [{"flags": strong}] * 2
    shapes = {
        (i // 17, x["input"]): (x["min"], x["opt"], x["max"])
        for i, x in enumerate(calls.named("IOptimizationProfile.set_shape"))
    }
    assert len(shapes) == 17 * 2
    assert shapes[0, "input_ids"] == ((3, 1),) * 3
    assert shapes[0, "active"] == ((3,),) * 3
    assert shapes[0, "ring_evict.1"] == ((3, 2, 4),) * 3
    assert shapes[1, "input_ids"] == ((1, 8),) * 3
    assert shapes[1, "table.0"] == ((1, 2, 4),) * 3
    for phase in (0, 1):
        assert shapes[phase, "keys.0"] == ((3, 64, 8), (21, 64, 8), (21, 64, 8))
        assert shapes[phase, "values.1"] == ((3, 64, 6), (21, 64, 6), (21, 64, 6))
    config = "IBuilderConfig"
    preview = module.PreviewFeature.ALIASED_PLUGIN_IO_10_03  # type: ignore[attr-defined]
    assert (
        calls.named(f"{config}.set_preview_feature") == [{"feature": preview, "enable": True}] * 2
    )
    assert [x["pool_size"] for x in calls.named(f"{config}.set_memory_pool_limit")] == [1 << 20] * 2
    caches = [x["serialized_timing_cache"] for x in calls.named(f"{config}.create_timing_cache")]
    assert caches == [b"", b"times"]  # the second build knows what the first one learned
    assert len(calls.named(f"{config}.add_optimization_profile")) == 2
    assert registered == [(manifest, tmp_path)]

    assert built == Manifest.load(tmp_path)
    assert built.phases["decode"].engine_sha256 == sha256(tmp_path / "decode.engine")
    assert (tmp_path / "prefill.engine").read_bytes() == b"prefill"
    facts = {x: (built.build or {})[x] for x in ("batch", "pages", "capability", "tensorrt")}
    assert facts == {"batch": 3, "pages": 20, "capability": "9.0", "tensorrt": real["version"]}
    assert not list(tmp_path.glob(".*"))


def test_what_is_parsed_are_plugins_with_weights_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: object
) -> None:
    world = use(monkeypatch, surface(), exported(tmp_path))
    build(tmp_path, gpu=GPU)
    assert [x for _, x in world.parsed] == [
        str(tmp_path / x) for x in ("decode.onnx", "prefill.onnx")
    ]
    model = onnx.ModelProto.FromString(world.parsed[0][0])
    assert [x.domain for x in model.functions] == ["else.where"]
    branch = next(x for x in model.graph.node if x.op_type == "If")
    ours = [x for x in model.graph.node if x.domain == DOMAIN]
    ours += [node for x in branch.attribute for node in x.g.node]
    assert [x.op_type for x in ours] == ["DmsDecodePartial", "DmsCacheUpdate", "DmsCacheUpdate"]
    for node in ours:
        found = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        assert found == {"aot": 1, "plugin_namespace": b"modelopt_dms", "plugin_version": b"1"}
    other = next(x for x in model.graph.node if x.op_type == "Other")
    assert not other.attribute
    onnx.checker.check_model(model)


def test_a_plugin_variant_made_twice_is_the_same_and_leaves_the_graph_alone() -> None:
    from modelopt_dms.exporters.tensorrt.graph import plugin_variant

    model = graph("DmsCacheUpdate", "DmsPrefillWrite")
    before = model.SerializeToString()
    once = plugin_variant(model)
    assert plugin_variant(once) == once
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (("DmsNoSuchOp",), "a modelopt_dms.DmsNoSuchOp; expected one of"),
        ((), "holds no op of the domain modelopt_dms"),
    ],
)
def test_graphs_without_our_ops_have_no_plugin_variant(
    types: tuple[str, ...], message: str
) -> None:
    from modelopt_dms.exporters.tensorrt.graph import plugin_variant

    with pytest.raises(ValueError, match=message):
        plugin_variant(graph(*types))


def test_plugin_free_graphs_are_built_as_they_are(
    real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = exported(tmp_path, toy_manifest(in_place=False), kernels=False)
    world = use(monkeypatch, real, manifest)
    build(tmp_path, BuildOptions(), gpu=GPU)
    assert world.parsed[1][0] == (tmp_path / "prefill.onnx").read_bytes()
    if "IAttention" in real["classes"]:
        assert world.double.named("IAttention.decomposable=") == [{"value": True}] * 2
    assert not world.double.named("IBuilderConfig.set_preview_feature")
    assert not world.double.named("IBuilderConfig.create_timing_cache")


def test_a_timing_cache_of_another_machine_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: object
) -> None:
    world = use(monkeypatch, surface(), exported(tmp_path))
    world.known_cache = False
    cache = tmp_path / "times"
    cache.write_bytes(b"of another GPU")
    build(tmp_path, BuildOptions(timing_cache=cache), gpu=GPU)
    tried = world.double.named("IBuilderConfig.create_timing_cache")
    assert [x["serialized_timing_cache"] for x in tried] == [b"of another GPU", b"", b"times"]
    assert cache.read_bytes() == b"times"


def test_a_failed_build_says_why_and_leaves_the_old_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: object
) -> None:
    world = use(monkeypatch, surface(), exported(tmp_path))
    built = build(tmp_path, gpu=GPU)
    world.errors = [("node_7", "No importer registered for op: DmsCacheUpdate"), ("n", "more")]
    with pytest.raises(
        ValueError,
        match=r"cannot parse decode.onnx \(2 errors\): node_7: No importer registered .*; n: more",
    ):
        build(tmp_path, gpu=GPU)
    world.errors, world.build_error = [], "no tactic for node_7"
    with pytest.raises(
        ValueError, match="cannot build an engine of decode.onnx: no tactic for node_7$"
    ):
        build(tmp_path, BuildOptions(batch=2), gpu=GPU)
    assert Manifest.load(tmp_path) == built
    assert (tmp_path / "decode.engine").read_bytes() == b"decode"


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_engines_generate_what_the_graphs_do(
    real: dict[str, Any],
    in_place: bool,
    graph: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registered: object,
) -> None:
    manifest = exported(tmp_path, toy_manifest(in_place=in_place), kernels=in_place)
    use(monkeypatch, real, manifest)
    build(tmp_path, BuildOptions(batch=3, pages=15), gpu=GPU)
    gpu: Any = FakeGpu()
    backend = TensorRTBackend(tmp_path, graph=graph, gpu=gpu)
    assert backend.state.pages == 15
    assert backend.state.stacks["keys"].shape[:2] == (2, 16)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(41, (n,), generator=generator).tolist() for n in (3, 17, 8)]
    running = Session(manifest, backend)
    expected = Session(manifest, ToyBackend(manifest, 3, 15)).generate(prompts, 6)
    assert running.generate(prompts, 6) == expected
    assert gpu.replays == (5 if graph else 0)


@pytest.mark.parametrize("in_place", [True, False])
def test_pages_are_as_many_as_memory_holds(
    in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: object
) -> None:
    manifest = exported(tmp_path, toy_manifest(in_place=in_place), kernels=in_place)
    use(monkeypatch, surface(), manifest)
    build(tmp_path, BuildOptions(batch=2, pages=30), gpu=GPU)
    # What is not changed in place is returned, into one buffer of both engines.
    copies = 1 if in_place else 2
    page = manifest.model.page_bytes * manifest.model.layers * copies
    small: Any = FakeGpu(free_bytes=page * 20)
    assert TensorRTBackend(tmp_path, gpu=small).state.pages == 15  # 80 %, and nobody's page
    assert TensorRTBackend(tmp_path, gpu=small, pages=7).state.pages == 7
    backend = TensorRTBackend(tmp_path, gpu=small)
    tensors = [backend.state.stacks[x] for x in ("keys", "values")]
    tensors += [y for x in backend._runs.values() for y in x.results.values() if y.ndim == 3]
    taken = {x.data_ptr(): x.numel() * x.element_size() for x in tensors if x.shape[-2] == 64}
    assert sum(taken.values()) == 16 * page
    full: Any = FakeGpu(free_bytes=1 << 10)
    with pytest.raises(
        ValueError, match="0 MiB free, which hold 0 pages of each of 2 layers; one .* 2 at"
    ):
        TensorRTBackend(tmp_path, gpu=full)


def test_pages_that_memory_does_not_hold_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: object
) -> None:
    manifest = exported(tmp_path)
    use(monkeypatch, surface(), manifest)
    build(tmp_path, BuildOptions(batch=2, pages=1169), gpu=GPU)

    def full(*sizes: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    small: Any = FakeGpu(free_bytes=1 << 20)
    with pytest.raises(
        EngineError, match=r"pages=1169 are too many .* take 7 MiB in all .* and 1 MiB were free"
    ):
        TensorRTBackend(tmp_path, gpu=small, pages=1169)


def test_the_log_keeps_errors_and_no_warnings() -> None:
    double = Double(surface(), {})
    log = make_log(double.module)
    severity = double.module.ILogger.Severity  # type: ignore[attr-defined]
    assert log.text() == "it does not say why"
    for level in (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING, severity.VERBOSE):
        log.log(level, f" {level} \n")
    assert log.text() == "INTERNAL_ERROR; ERROR"


@pytest.mark.parametrize(
    "misuse",
    [
        "trt.Builder()",
        "trt.Builder('logger')",
        "trt.Builder(logger=log, verbose=True)",
        "trt.Builder(log).max_batch_size",
        "trt.Builder(log).create_network(trt.BuilderFlag.DEBUG)",
        "trt.BuilderFlag.FP17",
        "1 << trt.BuilderFlag.DEBUG",
        "trt.Builder(log).create_builder_config().set_flag(4)",
        "trt.Builder(log).create_builder_config().max_workspace_size",
        "setattr(trt.Builder(log).create_builder_config(), 'max_workspace_size', 1)",
        "setattr(trt.Builder(log).create_builder_config(), 'num_optimization_profiles', 1)",
        "trt.ICudaEngine()",
        "trt.Runtime(log).deserialize_cuda_engine('text')",
        "trt.Builder(log).build_cuda_engine",
    ],
)
def test_the_double_refuses_what_the_bindings_do_not_have(misuse: str) -> None:
    world = World(surface(), toy_manifest(), None)
    trt = world.double.module
    with pytest.raises((TypeError, AttributeError)):
        eval(misuse, {"trt": trt, "log": make_log(trt), "setattr": setattr})
