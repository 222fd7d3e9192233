# SPDX-License-Identifier: Apache-2.0
"""Exported graphs, run by onnxruntime, are the PyTorch model: logits, tokens, evictions and slots."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import build, build_dms, distance, tokens
from onnx_graphs import Graphs
from transformers import PreTrainedModel

import modelopt_dms as dms
from modelopt_dms.config.recipe import load_recipe
from modelopt_dms.exporters import ExportError
from modelopt_dms.quantization.apply import quantize
from modelopt_dms.runtime.manifest import Manifest
from modelopt_dms.runtime.session import open_session

B, CHUNK, STEPS = 2, 16, 64
HELD = ("live", "seen", "ring_slot", "ring_evict")


def quantized(family: str, recipe: str, **facts: Any) -> PreTrainedModel:
    model = build_dms(family, **facts)
    config = load_recipe(recipe).quantize
    assert config is not None
    return quantize(model, config, [tokens(2, 32)])


def one_layer(family: str) -> PreTrainedModel:
    return build_dms(family, base={"num_hidden_layers": 1})


def rotated(kind: str) -> PreTrainedModel:
    """A model that says that some of its layers have this rotary embedding."""
    model = one_layer("llama")
    model.config.rope_parameters = {"full_attention": {"rope_type": kind}}
    return model


MODELS = {
    "fp8": lambda: quantized("llama", "fp8_default-kv_fp8-dms_cr8", base={"num_hidden_layers": 1}),
    "qwen3_moe": lambda: one_layer("qwen3_moe"),
}
# Tracing takes ten seconds a model: the others are not part of the default run.
MORE_MODELS = {
    "llama": lambda: build_dms("llama"),
    "qwen3": lambda: one_layer("qwen3"),
    "mistral": lambda: one_layer("mistral"),
    "shifted": lambda: build_dms("qwen2", base={"num_hidden_layers": 1}, decision_shift=True),
    "int8": lambda: quantized("llama", "kv_int8-dms_cr8", base={"num_hidden_layers": 1}),
}


PARAMETERS = [*MODELS, *(pytest.param(x, marks=pytest.mark.slow) for x in MORE_MODELS)]


@pytest.fixture(scope="module", params=PARAMETERS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Path]:
    model = (MODELS | MORE_MODELS)[request.param]()
    directory = tmp_path_factory.mktemp(request.param) / "graphs"
    dms.export(model, directory, "onnx", chunk=CHUNK, max_length=256)
    return model, directory


def test_prefill_and_64_steps_are_those_of_the_model(exported: tuple[Any, Path]) -> None:
    model, directory = exported
    for name in ("decode", "prefill"):
        onnx.checker.check_model(directory / f"{name}.onnx", full_check=True)
    graphs, ids = Graphs(directory, B), tokens(B, 2 * CHUNK)
    cache = dms.DMSCache(model, batch_size=B, max_length=256, impl="reference")
    none = np.zeros(B, np.int32)
    with torch.no_grad():
        for start in (0, CHUNK):
            part = ids[:, start : start + CHUNK]
            positions = np.arange(start, start + CHUNK)[None].repeat(B, 0)
            feeds = {"input_ids": part.numpy(), "positions": positions, "padding": none}
            logits = graphs.run("prefill", **feeds)
            expected = model(part, past_key_values=cache).logits[:, -1]
        for step in range(STEPS):
            assert distance(torch.from_numpy(logits), expected) < 1e-4
            token = expected.argmax(-1)[:, None]
            assert (logits.argmax(-1) == token[:, 0].numpy()).all()
            positions = np.full((B, 1), 2 * CHUNK + step)
            feeds = {"input_ids": token.numpy(), "positions": positions, "active": none == 0}
            logits = graphs.run("decode", **feeds)
            expected = model(token, past_key_values=cache).logits[:, -1]
    for index, layer in enumerate(cache.layers):
        state = layer.slots.state
        for name in HELD:
            assert (getattr(state, name).numpy() == graphs.state[f"{name}.{index}"]).all(), name
        assert int(state.live.max()) < 2 * CHUNK + STEPS  # something was evicted


def test_ragged_prompts_and_sequences_that_stand_still(exported: tuple[Any, Path]) -> None:
    """Two prompts of other lengths than a chunk, one of which decodes while the other waits."""
    model, directory = exported
    graphs = Graphs(directory, B)
    prompts = [tokens(1, 5, seed=3)[0], tokens(1, 37, seed=4)[0]]
    written: list[list[int]] = [[], []]
    logits = np.stack([graphs.read(i, x.numpy()) for i, x in enumerate(prompts)])
    waiting = {x: y[1].copy() for x, y in graphs.state.items() if x.startswith(HELD)}
    lengths = np.array([len(x) for x in prompts])
    for step in range(12):
        active = np.array([True, step >= 4])
        chosen = logits.argmax(-1)
        for i in range(B):
            if active[i]:
                written[i].append(int(chosen[i]))
        positions = (lengths + [len(x) - 1 for x in written])[:, None]
        feeds = {"input_ids": chosen[:, None], "positions": np.maximum(positions, 0)}
        found = graphs.run("decode", **feeds, active=active)
        logits = np.where(active[:, None], found, logits)
        if step == 3:
            assert all((graphs.state[x][1] == y).all() for x, y in waiting.items())
    for prompt, got in zip(prompts, written, strict=True):
        expected = model.generate(prompt[None], max_new_tokens=len(got))[0, len(prompt) :]
        assert got == expected.tolist()


def test_both_graphs_share_one_file_of_weights(exported: tuple[Any, Path]) -> None:
    model, directory = exported
    weights = (directory / "weights.bin").stat().st_size
    held = sum(
        x.numel() * x.element_size() for x in {id(x): x for x in model.parameters()}.values()
    )
    assert weights < 1.5 * held + (64 << 10)
    graphs = [
        onnx.load(directory / f"{x}.onnx", load_external_data=False) for x in ("decode", "prefill")
    ]
    for graph in graphs:
        stored = [x for x in graph.graph.initializer if x.external_data]
        assert {y.value for x in stored for y in x.external_data if y.key == "location"} == {
            "weights.bin"
        }


def test_fp8_weights_lie_in_the_file_as_bytes(exported: tuple[Any, Path]) -> None:
    model, directory = exported
    graph = onnx.load(directory / "decode.onnx", load_external_data=False).graph
    codes = [x for x in graph.initializer if x.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    fp8 = Manifest.load(directory).model.key_number == "fp8"
    assert len(codes) == (7 if fp8 else 0)  # q, k, v, o, gate, up, down
    kinds = {x.op_type for x in graph.node}
    assert ({"QuantizeLinear", "DequantizeLinear"} <= kinds) == fp8


@pytest.mark.parametrize(
    "build_model, message",
    [
        (lambda: build("llama"), "has no gates"),
        (lambda: build_dms("gemma2"), "1 layers without a gate"),
        (lambda: build_dms("deepseek_v2"), "latents"),
        (lambda: rotated("dynamic"), "a dynamic rotary embedding, which looks at positions"),
        (lambda: quantized("llama", "kv_nvfp4-dms_cr8"), r"k_bmm_quantizer .*\(2, 1\).*accepted"),
        (lambda: quantized("llama", "kv_fp8_dynamic-dms_cr8"), "no calibrated amax"),
        (
            lambda: quantized("llama", "nvfp4_default-kv_fp8-dms_cr8"),
            "weight_quantizer|input_quantizer",
        ),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(
    build_model: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        dms.export(build_model(), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunk": 20}, "chunk=20 must be a multiple of 16"),
        ({"max_length": 10}, "max_length=10 must be at least"),
        ({"plugin_free": True}, "plugin_free is no option of format='onnx'"),
    ],
)
def test_sizes_are_checked_first(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        dms.export(build_dms("llama"), tmp_path / "out", "onnx", **options)


@pytest.mark.slow
def test_experts_that_are_quantized_are_refused(tmp_path: Path) -> None:
    """They are computed past their quantizers, and the graph would be another model."""
    base = {"num_hidden_layers": 1}
    model = quantized("qwen3_moe", "fp8_default-kv_fp8-dms_cr8", base=base)
    with pytest.raises(ExportError, match="experts.*is not reached when the model is traced"):
        dms.export(model, tmp_path / "out", "onnx", chunk=CHUNK, max_length=64)
    assert not (tmp_path / "out").exists()


def test_pages_are_read_before_they_are_written(exported: tuple[Any, Path]) -> None:
    """Every pool goes from op to op in one chain, so that in place no order but that of the graph is possible."""
    _, directory = exported
    for phase in ("decode", "prefill"):
        graph = onnx.load(directory / f"{phase}.onnx", load_external_data=False).graph
        writers = {"DmsCacheUpdate", "DmsPrefillWrite"}
        for name in ("keys.0", "values.0"):
            chain = [x.op_type for x in graph.node if name in x.input]
            assert len(chain) == 1
            if phase == "prefill":
                reader = next(x for x in graph.node if name in x.input)
                passed = reader.output[1 if name.startswith("keys") else 2]
                chain = [x.op_type for x in graph.node if passed in x.input]
            assert set(chain) <= writers


def test_kernels_are_for_half_precision_only(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="dtype='float32'.*float16 or bfloat16"):
        dms.export(build_dms("llama"), tmp_path / "out", "tensorrt")


def test_a_session_writes_what_generate_writes(exported: tuple[Any, Path]) -> None:
    """Prompts of lengths that are no multiple of a chunk, and a batch slot more."""
    model, directory = exported
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 16, 41, 20, 7)]
    session = open_session(directory, "onnxruntime", batch=6)
    found = session.generate(prompts, max_new_tokens=24)
    for prompt, written in zip(prompts, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=24)[0, len(prompt) :]
        assert written == expected.tolist()
