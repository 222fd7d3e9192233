# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with engines says so in one message, and the command line in one line."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from counting_graphs import write_graphs
from paths import EMBEDDED
from tensorrt_double import FakeGpu, World
from tensorrt_surface import surface
from toy_engine import toy_manifest, with_model
from transformers import AutoTokenizer

from modelopt_dms.cli import main
from modelopt_dms.exporters.tensorrt.build import BuildOptions, build
from modelopt_dms.runtime.checks import check_files
from modelopt_dms.runtime.gpu import Gpu
from modelopt_dms.runtime.manifest import EngineError, Kernel, Manifest, ManifestError, sha256
from modelopt_dms.runtime.ort import OnnxRuntimeBackend
from modelopt_dms.runtime.session import Session, open_session
from modelopt_dms.runtime.tensorrt import TensorRTBackend

GPU: Any = FakeGpu()
needs_bindings = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_bindings") is None,
    reason="needs the tensorrt-cu13-bindings wheel (Linux)",
)


def exported(place: Path, manifest: Manifest | None = None) -> Manifest:
    """A directory with graphs that count, and a kernel."""
    (place / "kernels").mkdir(exist_ok=True)
    path = place / "kernels" / "update.ptx"
    path.write_text(".version 8.3")
    kernel = Kernel(
        "DmsCacheUpdate", "kernels/update.ptx", "e", sha256(path), "sm_90a", 128, 0, ("1",) * 3, ()
    )
    manifest = dataclasses.replace(manifest or toy_manifest(), kernels=(kernel,))
    write_graphs(manifest, place)
    return manifest


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A directory with engines, and TensorRT and its plugins."""
    manifest = exported(tmp_path)
    world = World(surface(), manifest, None)
    monkeypatch.setitem(sys.modules, "tensorrt", world.double.module)
    plugins = ModuleType("plugins")
    plugins.register = lambda *args: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelopt_dms.exporters.tensorrt.plugins", plugins)
    graph = ModuleType("graph")
    graph.plugin_variant = lambda model: model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelopt_dms.exporters.tensorrt.graph", graph)
    build(tmp_path, BuildOptions(batch=2, pages=30), gpu=GPU)
    return world


def test_without_tensorrt_one_learns_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for attempt in (lambda: build(tmp_path, gpu=GPU), lambda: TensorRTBackend(tmp_path, gpu=GPU)):
        with pytest.raises(EngineError, match=r"TensorRT is not installed .*pip install [^;]*$"):
            attempt()


def test_one_error_names_everything_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path)
    for name in ("tensorrt", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.version, "cuda", None)
    named = r"TensorRT is not installed .*'modelopt-dms\[tensorrt\]'.*; and torch .* without CUDA; `pip install torch`"
    with pytest.raises(EngineError, match=named):
        TensorRTBackend(tmp_path)
    with pytest.raises(EngineError, match=rf"{named}.*; and onnx is not installed.*dms\[onnx\]"):
        build(tmp_path)
    toy_manifest(in_place=False).save(tmp_path)
    with pytest.raises(EngineError, match=named) as plugin_free:
        build(tmp_path)
    assert "onnx is not" not in str(plugin_free.value)


@needs_bindings
@pytest.mark.parametrize("version", ["10.9.0.34", "8.6.1", "12.0.0"])
def test_a_tensorrt_that_we_do_not_know_is_refused(
    version: str, world: World, tmp_path: Path
) -> None:
    world.double.module.__version__ = version  # type: ignore[attr-defined]
    for attempt in (lambda: build(tmp_path, gpu=GPU), lambda: TensorRTBackend(tmp_path, gpu=GPU)):
        with pytest.raises(EngineError, match=f"wrong version: TensorRT {version} .*10.10 .. 11.x"):
            attempt()


@needs_bindings
def test_an_engine_of_another_tensorrt_is_refused(world: World, tmp_path: Path) -> None:
    world.double.module.__version__ = "11.3.0.9"  # type: ignore[attr-defined]
    with pytest.raises(
        EngineError, match=r"built with TensorRT 11.4.*, and 11.3.0.9 is installed.*engine build"
    ):
        TensorRTBackend(tmp_path, gpu=GPU)
    world.double.module.__version__ = "11.4.9.9"  # type: ignore[attr-defined]
    TensorRTBackend(tmp_path, gpu=GPU, graph=False)


@needs_bindings
def test_another_gpu_is_refused(world: World, tmp_path: Path) -> None:
    other: Any = FakeGpu("8.9")
    with pytest.raises(
        EngineError, match=r"wrong GPU: .* capability 9.0 \(H200 \(none\)\), .* has 8.9; run"
    ):
        TensorRTBackend(tmp_path, gpu=other)
    with pytest.raises(
        EngineError,
        match=r"wrong GPU: .* DmsCacheUpdate was compiled for sm_90a.*8.9; .*--plugin-free",
    ):
        build(tmp_path, gpu=other)
    newer: Any = FakeGpu("10.0")
    with pytest.raises(EngineError, match="sm_90a"):  # the "a" is for 9.0 only
        build(tmp_path, gpu=newer)


def test_without_a_gpu_one_learns_what_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no CUDA GPU is visible.*--backend onnxruntime"):
        Gpu()


@needs_bindings
@pytest.mark.parametrize(
    ("name", "port"),
    [
        ("live.1", ("int64", (-1, 2))),
        ("keys.0", ("float32", (-1, 64, 16))),
        ("new_live.0", ("int32", (-1, 2, 1))),
        ("extra", ("int32", (1,))),
    ],
)
def test_an_engine_that_is_not_what_the_manifest_says_is_refused(
    name: str, port: tuple[str, tuple[int, ...]], world: World, tmp_path: Path
) -> None:
    world.ports = {name: port}
    with pytest.raises(
        ManifestError, match=f"decode.engine, .*engine and manifest differ: .*{name}"
    ):
        TensorRTBackend(tmp_path, gpu=GPU)


@needs_bindings
def test_changed_kernels_are_refused(world: World, tmp_path: Path) -> None:
    path = tmp_path / "kernels" / "update.ptx"
    path.write_text("changed")
    with pytest.raises(
        ManifestError,
        match="update.ptx was changed since the export .*: its sha256.*DmsCacheUpdate",
    ):
        build(tmp_path, gpu=GPU)
    path.unlink()
    with pytest.raises(ManifestError, match="update.ptx is missing, the kernel of DmsCacheUpdate"):
        build(tmp_path, gpu=GPU)
    manifest = Manifest.load(tmp_path)
    kernel = dataclasses.replace(manifest.kernels[0], sha256="0" * 64)
    dataclasses.replace(manifest, kernels=(kernel,)).save(tmp_path)
    with pytest.raises(ManifestError, match="exported again after its engine was built"):
        TensorRTBackend(tmp_path, gpu=GPU)


@needs_bindings
def test_a_truncated_engine_is_refused(world: World, tmp_path: Path) -> None:
    path = tmp_path / "prefill.engine"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ManifestError, match=r"prefill.engine is truncated or changed \(6 bytes\)"):
        TensorRTBackend(tmp_path, gpu=GPU)
    path.unlink()
    with pytest.raises(ManifestError, match="prefill.engine is missing; run .*engine build"):
        TensorRTBackend(tmp_path, gpu=GPU)


@needs_bindings
def test_an_engine_that_tensorrt_cannot_load_says_why(world: World, tmp_path: Path) -> None:
    path = tmp_path / "decode.engine"
    path.write_bytes(b"no engine")
    manifest = Manifest.load(tmp_path)
    names = {x: f"{x}.engine" for x in manifest.phases}
    manifest.with_engines(names, tmp_path, manifest.build or {}).save(tmp_path)
    with pytest.raises(EngineError, match="TensorRT cannot load .*decode.engine: it does not say"):
        TensorRTBackend(tmp_path, gpu=GPU)


@needs_bindings
def test_what_was_not_built_yet_says_how_to_build_it(world: World, tmp_path: Path) -> None:
    exported(tmp_path)
    with pytest.raises(EngineError, match="no engine was built in .* yet; run .*engine build"):
        TensorRTBackend(tmp_path, gpu=GPU)


@needs_bindings
def test_a_session_asks_for_what_the_engine_was_built_for(world: World, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="batch=4 is not what the engine was built for: 2"):
        open_session(tmp_path, batch=4)
    with pytest.raises(EngineError, match="pages=31 is more than the 30 that the engine was built"):
        TensorRTBackend(tmp_path, gpu=GPU, pages=31)
    with pytest.raises(
        EngineError, match=r"pages=1 cannot hold one sequence: its 2 lists .*--page"
    ):
        TensorRTBackend(tmp_path, gpu=GPU, pages=1)
    assert TensorRTBackend(tmp_path, gpu=GPU, pages=2, graph=False).state.pages == 2
    with pytest.raises(EngineError, match="backend='trt' must be"):
        open_session(tmp_path, "trt")  # type: ignore[arg-type]


@needs_bindings
def test_a_graph_that_cannot_be_captured_can_be_run_without(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    gpu: Any = FakeGpu()
    monkeypatch.setattr(gpu, "capture", fail)
    world.graphs = lambda phase, tensors: {}
    with pytest.raises(EngineError, match="cannot be captured .*not permitted.*tensorrt-eager"):
        TensorRTBackend(tmp_path, gpu=gpu)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0 must be 1 or more"),
        ({"pages": 0}, "pages=0 must be 1 or more"),
        ({"workspace": -1}, "workspace=-1 must be 1 or more"),
        ({"pages": 1}, "pages=1 cannot hold one sequence: its 2 lists of a layer need a page each"),
    ],
)
def test_builds_that_make_no_sense_are_refused(
    options: dict[str, int], message: str, tmp_path: Path
) -> None:
    exported(tmp_path)
    with pytest.raises(EngineError, match=message):
        build(tmp_path, BuildOptions(**options), gpu=GPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["decode.onnx", "prefill.onnx"])
def test_missing_graphs_are_refused(missing: str, tmp_path: Path) -> None:
    exported(tmp_path)
    (tmp_path / missing).unlink()
    for attempt in (lambda: build(tmp_path, gpu=GPU), lambda: OnnxRuntimeBackend(tmp_path)):
        with pytest.raises(ManifestError, match=f"{missing} is missing; export again"):
            attempt()


@pytest.mark.parametrize("name", ["decode.onnx", "weights.bin"])
def test_graphs_and_weights_of_another_export_are_refused(name: str, tmp_path: Path) -> None:
    manifest = exported(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"1234")
    names = ("decode.onnx", "prefill.onnx", "weights.bin")
    files = {x: sha256(tmp_path / x) for x in names}
    dataclasses.replace(manifest, files=files).save(tmp_path)
    assert Manifest.load(tmp_path).files == files
    OnnxRuntimeBackend(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    for message in (
        rf"{name} was changed since the export \(\d+ bytes\): .* the manifest says",
        "is missing",
    ):
        for attempt in (lambda: build(tmp_path, gpu=GPU), lambda: OnnxRuntimeBackend(tmp_path)):
            with pytest.raises(ManifestError, match=f"{message}.*; export again"):
                attempt()
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnxruntime_is_fed_by_row_and_its_outputs_become_the_state(
    dtype: str, tmp_path: Path
) -> None:
    manifest = exported(tmp_path, toy_manifest(dtype=dtype))
    backend = OnnxRuntimeBackend(tmp_path, batch=3)
    running = Session(manifest, backend)
    found = running.generate([[3, 5], list(range(20)), [39]], 5)
    assert found == [[6, 7, 8, 9, 10], [*range(20, 25)], [40, 0, 1, 2, 3]]
    assert backend.state.stacks["seen"][:, :, 0].tolist() == [[6, 24, 5]] * 2
    assert backend.state.stacks["keys"].dtype == getattr(torch, dtype)
    # A row that has ended rests while the others go on.
    eos = dataclasses.replace(manifest.model, eos=(8,))
    running = Session(dataclasses.replace(manifest, model=eos), backend)
    assert running.generate([[3, 5], [20]], 6) == [[6, 7, 8], [*range(21, 27)]]
    assert backend.state.stacks["seen"][:, :, 0].tolist() == [[4, 6, 0]] * 2


def test_onnxruntime_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    with_model(toy_manifest(), dtype="bfloat16").save(tmp_path)
    with pytest.raises(
        EngineError, match="wrong dtype: onnxruntime's CPU kernels have no bfloat16"
    ):
        OnnxRuntimeBackend(tmp_path)
    exported(tmp_path)
    with pytest.raises(EngineError, match="batch=0 must be 1 or more"):
        OnnxRuntimeBackend(tmp_path, batch=0)
    toy_manifest(window=9).save(tmp_path)
    with pytest.raises(
        ManifestError,
        match=r"decode.onnx, inputs: engine and manifest differ: ring_slot.0 is int32 \[-1, 2, 4\], expected",
    ):
        OnnxRuntimeBackend(tmp_path)
    (tmp_path / "decode.onnx").write_bytes(b"not a graph")
    with pytest.raises(ManifestError, match="onnxruntime cannot load .*decode.onnx"):
        OnnxRuntimeBackend(tmp_path)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "the input input_ids is missing"),
        ({"input_ids": torch.zeros(1, 1)}, r"input_ids must be int64 \[1, 1\], got float32"),
        ({"input_ids": torch.zeros(2, 1).long()}, r"must be int64 \[1, 1\], got int64 \[2, 1\]"),
    ],
)
def test_feeds_of_another_dtype_or_shape_are_refused(
    feeds: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    exported(tmp_path)
    with pytest.raises(ManifestError, match=message):
        OnnxRuntimeBackend(tmp_path).run("decode", feeds)


def test_a_manifest_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    exported(tmp_path)
    manifest = with_model(Manifest.load(tmp_path), layers=3)
    with pytest.raises(ManifestError, match=r"no input keys.2; export again"):
        OnnxRuntimeBackend(tmp_path, manifest)


def test_too_few_pages_are_named_before_anything_runs(tmp_path: Path) -> None:
    exported(tmp_path)
    with pytest.raises(EngineError, match="pages=1 cannot hold one sequence.*--pages"):
        open_session(tmp_path, pages=1)


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "tensorrt"])
def test_no_batch_slots_and_no_pages_are_refused(backend: Any, tmp_path: Path) -> None:
    exported(tmp_path)
    for given in ({"batch": 0}, {"pages": 0}, {"pages": -1}):
        [(name, value)] = given.items()
        with pytest.raises(EngineError, match=f"{name}={value} must be 1 or more"):
            open_session(tmp_path, backend, **given)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command line's exit status."""
    monkeypatch.setattr(sys, "argv", ["modelopt-dms", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "."), "holds no dms_engine.json"),
        (("run", ".", "-p", "x"), "holds no dms_engine.json"),
        (("run", "mute", "-p", "x"), "mute holds no tokenizer that can be read; export"),
        (("build", "{}", "--pages", "1"), "pages=1 cannot hold one sequence"),
        (("run", "{}", "-p", "x", "--backend", "tensorrt"), "TensorRT is not installed"),
        (("bench", "{}", "--pages", "1"), "pages=1 cannot hold one sequence"),
        (("bench", "{}", "--pages", "2", "--prompt-length", "99"), "--pages 4, fewer prompts"),
        (("bench", "{}"), "too long a prompt for the profile: 512 tokens and 2 new ones"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "engine"
    place.mkdir()
    exported(place)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(place)
    (tmp_path / "mute").mkdir()
    exported(tmp_path / "mute", toy_manifest(dtype="bfloat16"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.chdir(tmp_path)
    given = [x.format(place) for x in arguments]
    assert command(monkeypatch, "engine", *given) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert message in said[0]


def test_the_command_line_runs_benches_and_inspects_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    exported(tmp_path, with_vocabulary(len(tokenizer)))
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("The")["input_ids"]
    expected = tokenizer.decode(range(ids[-1] + 1, ids[-1] + 6), skip_special_tokens=True)
    given = ("engine", "run", str(tmp_path), "-p", "The", "--max-new-tokens", "5", "--stats")
    assert command(monkeypatch, *given) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{expected}\n")
    assert "4 steps; ended by length" in said

    figures = tmp_path / "figures.json"
    given = ("engine", "bench", str(tmp_path), "--batch", "2", "--prompt-length", "9")
    assert command(monkeypatch, *given, "--new-tokens", "4", "--json", str(figures)) == 0
    found = json.loads(figures.read_text())
    assert (found["batch"], found["context_tokens"]) == (2, 12)

    capsys.readouterr()
    assert command(monkeypatch, "engine", "inspect", str(tmp_path)) == 0
    said = capsys.readouterr().out
    for text in ("ToyForCausalLM", "new_keys.0", "DmsCacheUpdate", "not built yet"):
        assert text in said


def with_vocabulary(size: int) -> Manifest:
    """The toy's manifest with logits of so many tokens."""
    manifest = with_model(toy_manifest(), vocabulary=size)
    phases = {}
    for name, phase in manifest.phases.items():
        logits = dataclasses.replace(phase.outputs[0], shape=("batch", size))
        phases[name] = dataclasses.replace(phase, outputs=(logits, *phase.outputs[1:]))
    return dataclasses.replace(manifest, phases=phases)


def test_a_manifest_cannot_leave_out_the_hashes_of_its_graphs(tmp_path: Path) -> None:
    manifest = dataclasses.replace(toy_manifest(), made_by={"modelopt-dms": "0"}, files={})
    with pytest.raises(ManifestError, match=r"files has no hash of decode.onnx"):
        check_files(manifest, tmp_path)
    with pytest.raises(ManifestError, match=r"phases are \[\], expected \['decode', 'prefill'\]"):
        check_files(dataclasses.replace(manifest, phases={}), tmp_path)
