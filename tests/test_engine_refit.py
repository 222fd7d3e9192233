# SPDX-License-Identifier: Apache-2.0
"""New weights in engines that were built already, against a double that has the surface of the real bindings."""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from families import build_dms
from tensorrt_double import FakeGpu, World
from tensorrt_surface import surface
from toy_engine import toy_manifest, with_model

import modelopt_dms as dms
from modelopt_dms.cli import main
from modelopt_dms.engine.errors import EngineError
from modelopt_dms.engine.manifest import Kernel, Manifest, ManifestError, sha256
from modelopt_dms.engine.operators import DOMAIN
from modelopt_dms.exporters.tensorrt.build import BuildOptions, build
from modelopt_dms.exporters.tensorrt.refit import refit
from modelopt_dms.exporters.tensorrt.weights import changed_weights
from modelopt_dms.output import OutputError

onnx = pytest.importorskip("onnx")
if importlib.util.find_spec("tensorrt_bindings") is None:
    pytest.skip("needs the tensorrt-cu13-bindings wheel (Linux)", allow_module_level=True)

GPU: Any = FakeGpu()
OLD = "TENSORRT_10_BINDINGS"
LARGE = np.arange(600, dtype=np.float32)  # lies in the file beside the graphs


def graph(threshold: float, scale: float, node: str = "Mul") -> Any:
    """A graph with two weights and an op of ours."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(n, floats, [600]) for n in "xy")
    nodes = [
        helper.make_node("DmsCacheUpdate", ["x"], ["a"], name="update", domain=DOMAIN),
        helper.make_node(node, ["a", "large"], ["b"], name="product"),
        helper.make_node("Sub", ["b", "threshold"], ["y"], name="gate"),
    ]
    weights = [
        onnx.numpy_helper.from_array(LARGE * scale, "large"),
        onnx.numpy_helper.from_array(np.array([threshold], np.float32), "threshold"),
    ]
    opset = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=opset)


def exported(
    place: Path,
    threshold: float = 0.5,
    scale: float = 1.0,
    manifest: Manifest | None = None,
    ptx: str = ".version 8.3\n",
    node: str = "Mul",
) -> Path:
    """A directory as an export leaves it."""
    manifest = manifest or toy_manifest()
    (place / "kernels").mkdir(parents=True)
    path = place / "kernels" / "update.ptx"
    path.write_text(ptx)
    kernel = Kernel(
        "DmsCacheUpdate", "kernels/update.ptx", "e", sha256(path), "sm_90a", 128, 0, ("1",) * 3, ()
    )
    for phase in manifest.phases.values():
        model = graph(threshold, scale, node)
        options: dict[str, Any] = {"save_as_external_data": True, "location": "weights.bin"}
        onnx.save(model, str(place / phase.graph), **options, size_threshold=1024)
    (place / "tokenizer.json").write_text(f"of threshold {threshold}")
    kernels = () if manifest.plugin_free else (kernel,)
    files = {x.name: sha256(x) for x in (*place.glob("*.onnx"), place / "weights.bin")}
    manifest = dataclasses.replace(manifest, kernels=kernels, files=files)
    manifest.save(place)
    return place


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("plugins")
    module.register = lambda *args: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelopt_dms.exporters.tensorrt.plugins", module)


@pytest.fixture(params=["installed", pytest.param("10.10", marks=pytest.mark.tensorrt)])
def real(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The surface of the bindings."""
    if request.param == "installed":
        return surface()
    if OLD not in os.environ:
        pytest.skip(f"{OLD} names no directory: make test-tensorrt")
    return surface(os.environ[OLD])


def engines(
    place: Path, monkeypatch: pytest.MonkeyPatch, real: dict[str, Any] | None = None, **facts: Any
) -> World:
    """A directory with engines, and TensorRT."""
    manifest = facts.pop("manifest", toy_manifest())
    exported(place, manifest=manifest)
    world = World(real or surface(), manifest, None)
    monkeypatch.setitem(sys.modules, "tensorrt", world.double.module)
    build(place, BuildOptions(batch=2, pages=30, **{"refit": True, **facts}), gpu=GPU)
    return world


def held(path: Path) -> dict[str, Any]:
    """What the double writes into an engine that was refitted."""
    return json.loads(path.read_text().partition(" ")[2])


def content(place: Path) -> dict[str, bytes]:
    return {str(x.relative_to(place)): x.read_bytes() for x in place.rglob("*") if x.is_file()}


def test_engines_get_the_weights_of_another_export(
    real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", exported(tmp_path / "new", threshold=0.25, scale=2.0)
    world = engines(old, monkeypatch, real)
    built = Manifest.load(old)
    done = refit(old, new, gpu=GPU)

    assert done == Manifest.load(old)
    for name, phase in done.phases.items():
        path = old / f"{name}.engine"
        assert held(path)["threshold"] == [0.25]
        assert held(path)["large"] == (LARGE * 2).tolist()
        assert phase.engine_sha256 == sha256(path) != built.phases[name].engine_sha256
    # What was parsed is the plugins' graph, with the weights of the new directory beside it.
    assert [x for _, x in world.refitted] == [str(new / f"{x}.onnx") for x in ("decode", "prefill")]
    parsed = onnx.ModelProto.FromString(world.refitted[0][0])
    assert {x.name for x in parsed.graph.node[0].attribute} >= {"aot", "plugin_namespace"}
    # The graphs that onnxruntime runs, and the tokenizer, are those of the engines.
    for name in ("decode.onnx", "prefill.onnx", "weights.bin", "tokenizer.json"):
        assert (old / name).read_bytes() == (new / name).read_bytes(), name
    assert not [x for x in content(old) if "/." in f"/{x}"]
    facts, before = done.build or {}, built.build or {}
    assert facts["refitted"] == 2
    assert facts["weights"] == {"weights.bin": sha256(new / "weights.bin")}
    again = "INCLUDE_REFIT" in real["classes"]["SerializationFlag"]["members"]
    assert facts["refit"] is again
    kept = ("batch", "pages", "tensorrt", "capability", "kernels")
    assert {x: facts[x] for x in kept} == {x: before[x] for x in kept}
    cleared = [str(x["flag"]) for x in world.double.named("ISerializationConfig.clear_flag")]
    assert cleared == ["EXCLUDE_WEIGHTS"] * 2


def test_an_engine_that_was_refitted_is_refitted_again_or_says_that_it_cannot(
    real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    engines(old, monkeypatch, real)
    first, second = (exported(tmp_path / str(x), threshold=x) for x in (0.25, 0.75))
    done = refit(old, first, gpu=GPU)
    if (done.build or {})["refit"]:
        refit(old, second, gpu=GPU)
        assert held(old / "decode.engine")["threshold"] == [0.75]
    else:
        with pytest.raises(EngineError, match="hold their weights for good; build"):
            refit(old, second, gpu=GPU)


def test_with_an_output_the_old_engines_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", exported(tmp_path / "new", threshold=0.25)
    engines(old, monkeypatch)
    before = content(old)
    done = refit(old, new, tmp_path / "out", gpu=GPU)
    assert content(old) == before
    assert set(content(tmp_path / "out")) == set(before)
    assert done == Manifest.load(tmp_path / "out")
    assert (done.build or {})["refitted"] == 1
    assert held(tmp_path / "out" / "prefill.engine")["threshold"] == [0.25]
    with pytest.raises(OutputError, match="holds files that are not ours"):
        refit(old, new, tmp_path / "out", gpu=GPU)


def test_plugin_free_engines_are_refitted_from_the_graph_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = toy_manifest(in_place=False)
    old, new = tmp_path / "old", exported(tmp_path / "new", 0.25, manifest=manifest)
    world = engines(old, monkeypatch, manifest=manifest)
    refit(old, new, gpu=GPU)
    assert world.refitted[1][0] == (new / "prefill.onnx").read_bytes()


def test_a_model_may_end_its_text_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = exported(tmp_path / "new", manifest=toy_manifest(eos=(7,)))
    engines(tmp_path / "old", monkeypatch)
    assert refit(tmp_path / "old", new, gpu=GPU).model.eos == (7,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"manifest": toy_manifest(window=9)}, r"model\.window is 3 and 9"),
        ({"manifest": toy_manifest(chunk=16)}, r"another model .*: chunk is 8 and 16"),
        ({"manifest": with_model(toy_manifest(), dtype="float16")}, "dtype is 'float32' and 'floa"),
        ({"ptx": ".version 8.4\n"}, "kernel of DmsCacheUpdate is another one in the new export"),
        ({"node": "Div"}, r"graphs decode.onnx differ at node product \(Mul\), not only in their"),
    ],
)
def test_another_architecture_or_kernel_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    engines(old, monkeypatch)
    before = content(old)
    with pytest.raises((EngineError, ManifestError), match=message):
        refit(old, exported(tmp_path / "new", **change), gpu=GPU)
    assert content(old) == before


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"fixed": {"threshold"}},
            "1 weights of decode.onnx that differ cannot be replaced, .* threshold; build engines",
        ),
        ({"unnamed": {"bias"}}, "decode.onnx lacks 1 weights that the engine needs: bias; build"),
        ({"errors": [("n", "large has 600 elements")]}, "take the weights .*: large has 600 elem"),
        ({"refit_error": "counts differ"}, "refuses the weights of decode.onnx: counts differ$"),
    ],
)
def test_weights_that_an_engine_cannot_take_are_named(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", exported(tmp_path / "new", threshold=0.25)
    world = engines(old, monkeypatch)
    before = content(old)
    vars(world).update(change)
    for output in (None, tmp_path / "out"):
        with pytest.raises(EngineError, match=message):
            refit(old, new, output, gpu=GPU)
    assert content(old) == before
    assert not (tmp_path / "out").exists()


def test_a_folded_weight_that_stays_the_same_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", exported(tmp_path / "new", threshold=0.25)
    world = engines(old, monkeypatch)
    world.fixed = {"large"}
    assert (refit(old, new, gpu=GPU).build or {})["refitted"] == 1


def test_engines_that_hold_their_weights_for_good_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines(tmp_path / "old", monkeypatch, refit=False)
    with pytest.raises(EngineError, match="for good; build them with --refit"):
        refit(tmp_path / "old", exported(tmp_path / "new"), gpu=GPU)


def test_a_tensorrt_that_drops_biases_builds_no_such_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(surface() | {"version": "11.3.0.51"}, toy_manifest(), None)
    monkeypatch.setitem(sys.modules, "tensorrt", world.double.module)
    exported(tmp_path / "new")
    with pytest.raises(EngineError, match=r"TensorRT 11\.3\.0\.51 may drop a bias.*--refit"):
        build(tmp_path / "new", BuildOptions(refit=True), gpu=GPU)
    assert not world.parsed
    build(tmp_path / "new", gpu=GPU)


@pytest.mark.slow
def test_exports_of_a_model_and_of_the_same_with_other_weights_are_one_graph(
    tmp_path: Path,
) -> None:
    for seed in (0, 1):
        model = build_dms("llama", seed, base={"num_hidden_layers": 1})
        dms.export(model, tmp_path / str(seed), "onnx", chunk=16, max_length=64)
    for phase in ("decode", "prefill"):
        paths = [tmp_path / str(x) / f"{phase}.onnx" for x in (0, 1)]
        changed = changed_weights(*paths)
        weights = onnx.load(str(paths[0]), load_external_data=False).graph.initializer
        # What is small and stays are constants of the architecture, such as the frequencies of rotary embeddings.
        large = {x.name for x in weights if np.prod(x.dims) > 16}
        assert large <= changed
        assert (
            len(changed) == 14
        )  # 7 matrices, 3 norms, embeddings, head, a gate's weight and threshold


def test_what_is_no_pair_of_directories_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = exported(tmp_path / "new")
    plain = exported(tmp_path / "plain")
    engines(tmp_path / "old", monkeypatch)
    with pytest.raises(EngineError, match="no engine was built in"):
        refit(plain, new, gpu=GPU)
    with pytest.raises(EngineError, match="is the directory of the engines itself"):
        refit(new, new, gpu=GPU)
    with pytest.raises(EngineError, match="wrong GPU"):
        other: Any = FakeGpu("8.9")
        refit(tmp_path / "old", new, gpu=other)
    for place in (new, tmp_path / "old"):
        (place / "weights.bin").write_bytes(b"short")
        with pytest.raises(ManifestError, match=rf"{place.name}/weights.bin was changed .*5 bytes"):
            refit(tmp_path / "old", new, gpu=GPU)
        (place / "weights.bin").unlink()
        with pytest.raises(ManifestError, match=rf"{place.name}/weights.bin is missing; export"):
            refit(tmp_path / "old", new, gpu=GPU)
        exported(tmp_path / "fresh")
        shutil.copy(tmp_path / "fresh" / "weights.bin", place / "weights.bin")
        shutil.rmtree(tmp_path / "fresh")


def test_weights_that_no_manifest_names_must_fit_the_graphs(tmp_path: Path) -> None:
    places = [exported(tmp_path / str(x)) for x in (1, 2)]
    graphs = [x / "decode.onnx" for x in places]
    (places[1] / "weights.bin").write_bytes(b"short")
    with pytest.raises(ManifestError, match=r"weights.bin is truncated: .* bytes of large"):
        changed_weights(*graphs)
    (places[1] / "weights.bin").unlink()
    with pytest.raises(ManifestError, match=r"weights.bin is missing, the weights of decode.onnx"):
        changed_weights(*graphs)


def test_documentation_of_nodes_is_no_difference(tmp_path: Path) -> None:
    places = [exported(tmp_path / str(x), threshold=x) / "decode.onnx" for x in (1.0, 2.0)]
    model = onnx.load(str(places[1]), load_external_data=False)
    model.graph.node[0].doc_string = "line 77"
    model.graph.node[1].metadata_props.add(key="source", value="line 78")
    places[1].write_bytes(model.SerializeToString())
    assert changed_weights(*places) == {"threshold"}
    del model.graph.node[-1]
    places[1].write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="decode.onnx differ: 8 parts before, 7 now"):
        changed_weights(*places)


def test_the_command_line_refits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", exported(tmp_path / "new", threshold=0.25)
    engines(old, monkeypatch)
    monkeypatch.setattr("modelopt_dms.exporters.tensorrt.refit.Gpu", lambda: GPU)
    command = ["engine", "refit", str(old), "--from", str(new)]
    monkeypatch.setattr(sys, "argv", ["modelopt-dms", *command])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "1 weights differ" in " ".join(capsys.readouterr().out.split())
    assert held(old / "decode.engine")["threshold"] == [0.25]
