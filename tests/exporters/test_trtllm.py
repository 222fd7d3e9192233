# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM: the checkpoint, the graph with its gates, and the cached op in the hands of a double of AutoDeploy."""

import copy
import importlib.util
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import autodeploy
import pytest
import torch
import yaml
from families import WINDOW, build, build_dms, distance, open_gates, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import modelopt_dms as dms
from modelopt_dms import cli
from modelopt_dms.checkpoints.unified_hf import PACKED_FILE
from modelopt_dms.config.bundled import embedded_model_dir
from modelopt_dms.exporters import FORMATS, ExportError
from modelopt_dms.exporters.trtllm import backend, graph, ops, register
from modelopt_dms.exporters.trtllm.checkpoint import CONFIG_FILE, PLUGIN
from modelopt_dms.exporters.trtllm.ops import CACHED, METADATA, SOURCE
from modelopt_dms.exporters.trtllm.state import STATE
from modelopt_dms.kernels.layout import OutOfPagesError
from modelopt_dms.kvcache.hf_cache import kv_stats

FP8 = "fp8_default-kv_fp8-dms_cr8"
KV_ONLY = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True},
    ],
    "algorithm": "max",
}
GATES: dict[str, dict[str, Any]] = {
    "adapter": {"protect_first": 3},
    "neuron": {"gate": "neuron"},
    "residual": {"gate": "residual", "decision_shift": 1},
}


@cache
def with_graph(gate: str) -> tuple[PreTrainedModel, Any]:
    """A model with gates of a kind, and its graph, which takes seconds to get; a test leaves both as they were."""
    layers = {"num_hidden_layers": 2 if gate == "adapter" else 1}
    model = build_dms("llama", base=layers, **GATES[gate])
    return model, take(model)


@pytest.fixture
def llama() -> PreTrainedModel:
    return with_graph("adapter")[0]


@pytest.fixture
def llama_graph() -> Any:
    return with_graph("adapter")[1]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A TensorRT-LLM that knows DMS."""
    found = autodeploy.install(monkeypatch)
    register()
    return found


def engine(double: SimpleNamespace, taken: Any, slots: int = 3, longest: int = 128) -> Any:
    descriptor = double.AttentionRegistry.get("dms")
    return autodeploy.Engine(taken, descriptor, slots, longest)


def take(model: PreTrainedModel) -> Any:
    return autodeploy.export(graph.prepare(copy.deepcopy(model)))


def quantized(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    return dms.quantize(copy.deepcopy(model), config, [tokens(4, 32, seed=5)])


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


# The checkpoint.


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_the_checkpoint_reads_back_and_says_what_tensorrt_llm_must_know(
    llama: PreTrainedModel, kind: str, tmp_path: Path
) -> None:
    model = llama if kind == "plain" else quantized(llama, dms.load_recipe(FP8).quantize)
    place = dms.export(model, tmp_path / "out", "trtllm")
    ids = tokens(2, 20)
    assert torch.equal(logits(dms.load(place), ids), logits(model, ids))
    config = json.loads((place / "config.json").read_text())
    assert config["dms_config"]["window"] == WINDOW
    assert config["architectures"] == ["LlamaForCausalLM"]
    serving = yaml.safe_load((place / CONFIG_FILE).read_text())
    assert (serving["model_factory"], serving["attn_backend"]) == (backend.FACTORY, backend.NAME)
    # model_kwargs change only what the config has.
    assert serving["model_kwargs"].keys() <= config.keys()
    readme = (place / "README.md").read_text()
    assert "never run" in readme and CONFIG_FILE in readme and PLUGIN in readme
    assert (place / PACKED_FILE).exists() == (kind == "fp8")
    if kind == "fp8":
        facts = json.loads((place / PACKED_FILE).read_text())
        assert facts["producer"]["name"] == "modelopt" and facts["dms"]["window"] == WINDOW
        section = facts["quantization"]
        assert section["quant_algo"] == section["kv_cache_quant_algo"] == "FP8"
        assert section["group_size"] is None and "*.dms_gate*" in section["exclude_modules"]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", "needs gates on every attention layer"),
        ("deepseek_v2", "caches latents"),
        ("gpt_oss", "needs gates on every attention layer"),
    ],
)
def test_what_the_backend_cannot_serve_is_not_exported(
    family: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        dms.export(build_dms(family), tmp_path / "out", "trtllm")
    assert not (tmp_path / "out").exists()


def test_models_without_gates_and_other_number_formats_are_not_exported(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="has no gates"):
        dms.export(build("llama"), tmp_path / "out", "trtllm")
    four_bits = quantized(build_dms("llama", base={"head_dim": 16}), _kv("kv_nvfp4-dms_cr8"))
    with pytest.raises(ExportError, match="keys as nvfp4 .* takes FP8"):
        dms.export(four_bits, tmp_path / "out", "trtllm")
    eight_bits = quantized(llama, _kv("int8_smoothquant-dms_cr4"))
    with pytest.raises(ExportError, match="quant_algo='.*' cannot be served"):
        dms.export(eight_bits, tmp_path / "out", "trtllm")
    assert not (tmp_path / "out").exists()


def _kv(recipe: str) -> Any:
    return dms.load_recipe(recipe).quantize


@pytest.mark.parametrize(
    "name", ["trtllm-engine", "trtllm-build", "tensorrt_llm_engine", "TRTLLM_ENGINE"]
)
def test_who_asks_for_an_engine_of_tensorrt_llm_is_told_what_became_of_them(
    name: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="removed after 1.3.0rc20.*'tensorrt'.*1.2.1"):
        dms.export(llama, tmp_path, name)


def test_other_names_are_refused_with_those_that_are_known(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="TensorRT-LLM's is 'trtllm'"):
        dms.export(llama, tmp_path, "tensorrt-llm")
    with pytest.raises(ExportError, match=f"format='gguf' is not known; .*{', '.join(FORMATS)}"):
        dms.export(llama, tmp_path, "gguf")


def test_the_command_line_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir())
    dms.apply_dms(model, {"window": 16}).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(embedded_model_dir()).save_pretrained(tmp_path / "model")
    words = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--format", "trtllm"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="0"):
        patch.setattr("sys.argv", ["modelopt-dms", *words])
        cli.main()
    assert "saved to" in capsys.readouterr().out
    assert (tmp_path / "out" / CONFIG_FILE).exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


# The graph.


@pytest.mark.parametrize("gate", GATES)
def test_the_exported_graph_computes_what_the_model_does(gate: str) -> None:
    compare(*with_graph(gate))


@pytest.mark.slow
def test_the_graph_of_a_mixture_of_experts_does_so_too() -> None:
    model = build_dms("qwen3_moe", base={"num_hidden_layers": 1})
    compare(model, take(model))


def compare(model: PreTrainedModel, found: Any) -> None:
    """The graph has a node a layer, computes the model's logits, and evicts."""
    called = [x.target for x in found.graph.nodes if x.op == "call_function"]
    assert called.count(SOURCE.default) == len(model.model.layers)
    ids = tokens(3, 24)
    with torch.no_grad():
        (out,) = found(input_ids=ids, position_ids=torch.arange(24).repeat(3, 1))
    assert distance(out, logits(model, ids)) < 1e-6
    with dms.eviction_off(model):
        assert distance(out, logits(model, ids)) > 1e-3


def test_the_source_op_stands_where_autodeploy_looks_for_its_arguments() -> None:
    """Tensors first, the same in both ops; sliding_window is asked of every node that is replaced."""
    first = [x.name for x in SOURCE.default._schema.arguments]
    second = [x.name for x in CACHED.default._schema.arguments]
    assert first[:4] == second[:4] == ["query", "key", "value", "evict"]
    assert second[4:] == [*METADATA, *STATE, "scale", "window", "shift", "key_amax", "value_amax"]
    assert "sliding_window" in first and "attn_mask" not in first
    changed = {x.name for x in CACHED.default._schema.arguments if x.alias_info}
    assert changed == set(STATE)


# The cached op, driven as AutoDeploy does.


def run(server: Any, slot: int, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """Greedy continuation of one sequence alone, and its last logits."""
    out = server.step([(slot, 0, prompt)])[0][-1]
    made = [int(out.argmax())]
    while len(made) < count:
        out = server.step([], [(slot, len(prompt) + len(made) - 1, made[-1])])[0][-1]
        made.append(int(out.argmax()))
    return made, out


def generated(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("gate", GATES)
def test_ragged_sequences_that_come_and_go_equal_generate(
    gate: str, double: SimpleNamespace
) -> None:
    model, found = with_graph(gate)
    server = engine(double, found)
    prompts = {
        name: tokens(1, n, seed=n)[0].tolist() for name, n in (("a", 30), ("b", 9), ("c", 17))
    }
    expected = {name: generated(model, prompt, 24) for name, prompt in prompts.items()}
    made: dict[str, list[int]] = {name: [] for name in prompts}

    def step(new: dict[str, int], running: dict[str, int]) -> None:
        singles = [
            (slot, len(prompts[name]) + len(made[name]) - 1, made[name][-1])
            for name, slot in running.items()
        ]
        outs = server.step([(slot, 0, prompts[name]) for name, slot in new.items()], singles)
        for name, out in zip((*new, *running), outs, strict=True):
            made[name].append(int(out[-1].argmax()))

    step({"a": 2, "b": 0}, {})
    for _ in range(5):
        step({}, {"b": 0, "a": 2})
    step({"c": 1}, {"a": 2})  # a prompt joins while others decode; b waits
    for _ in range(17):
        step({}, {"c": 1, "b": 0, "a": 2})
    made["b2"], prompts["b2"] = [], prompts["c"]
    step({"b2": 2}, {"c": 1})  # a is done, and its slot goes to another
    for _ in range(8):
        step({}, {"b2": 2})
    assert made["a"] == expected["a"] and len(made["a"]) == 24
    assert made["b"] == expected["b"][: len(made["b"])] and len(made["b"]) == 23
    assert made["c"] == expected["c"][: len(made["c"])] and len(made["c"]) == 19
    assert made["b2"] == expected["c"][:9]


def test_the_lists_are_as_long_as_those_of_our_own_cache(
    llama: PreTrainedModel, llama_graph: Any, double: SimpleNamespace
) -> None:
    server = engine(double, llama_graph)
    prompt = tokens(1, 30, seed=3)[0].tolist()
    run(server, 1, prompt, 20)
    generated(llama, prompt, 20)
    for i, layer in enumerate(kv_stats(llama).layers):
        live = next(x for name, x in server.caches.items() if name == f"r{9 * i + 5}_live")
        assert torch.equal(live[1].long(), layer.resident[0])
        assert live[1].max() < 49  # something was evicted
        table = server.caches[f"r{9 * i + 4}_table"]
        assert not table[0].any() and table[1].any()


@pytest.mark.slow
def test_the_kernels_compute_what_the_reference_does(
    double: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted; slices and copies of the engine's tensors are what they are given."""
    model, found = with_graph("residual")
    server = engine(double, found)
    ids = tokens(1, 20, seed=6)
    want = logits(model, ids)[0]
    row = ids[0].tolist()
    monkeypatch.setattr("modelopt_dms.kernels.dispatch.choose", lambda impl, device: "triton")
    with monkeypatch.context() as patch:
        patch.setattr("modelopt_dms.exporters.trtllm.ops.CHUNK", 8)
        whole, part = server.step([(2, 0, row[:18]), (0, 0, row[:9])])
    assert distance(whole, want[:18]) < 1e-5 and distance(part, want[:9]) < 1e-5
    for i in range(2):
        outs = server.step([], [(0, 9 + i, row[9 + i]), (2, 18 + i, row[18 + i])])
        assert distance(torch.cat(outs), want[[9 + i, 18 + i]]) < 1e-5


def test_a_prompt_in_parts_equals_the_whole(
    llama: PreTrainedModel, llama_graph: Any, double: SimpleNamespace
) -> None:
    server = engine(double, llama_graph)
    ids = tokens(1, 40, seed=8)
    want = logits(llama, ids)[0]
    parts = [server.step([(0, at, ids[0, at : at + 8].tolist())])[0] for at in range(0, 40, 8)]
    assert distance(torch.cat(parts), want) < 1e-5


@torch.no_grad()
def test_an_fp8_cache_of_an_exported_checkpoint_equals_the_quantized_model(
    llama: PreTrainedModel, double: SimpleNamespace, tmp_path: Path
) -> None:
    """From the directory to the tokens: AutoDeploy's factory with our gates, its weights, KV ranges from the file."""
    model = quantized(llama, KV_ONLY)
    place = dms.export(model, tmp_path / "out", "trtllm")
    built = double.ModelFactoryRegistry.get(backend.FACTORY)(place).load()
    server = engine(double, autodeploy.export(built))
    assert server.caches["r0_keys"].dtype == torch.uint8
    prompt = tokens(1, 30, seed=4)[0].tolist()
    made, last = run(server, 1, prompt, 16)
    assert made == generated(model, prompt, 16)
    whole = torch.tensor([[*prompt, *made[:-1]]])
    assert distance(last, logits(model, whole)[0, -1]) < 1e-4
    assert distance(last, logits(llama, whole)[0, -1]) > 1e-3


def test_a_small_pool_serves_what_evicts_enough_and_says_when_it_does_not(
    double: SimpleNamespace,
) -> None:
    base = {"num_hidden_layers": 1, "max_position_embeddings": 320}
    model = open_gates(build_dms("llama", base=base), fraction=0.8)
    model.config.dms_pool_ratio = 1.5
    server = engine(double, take(model), slots=2, longest=320)
    assert len(server.caches["r0_keys"]) - 1 == 2 * 7  # KV heads, two thirds of 2 slots of 5 pages
    prompt = tokens(1, 300, seed=2)[0].tolist()
    for slot in (0, 1):
        assert run(server, slot, prompt, 8)[0] == generated(model, prompt, 8)
    for name, threshold in server.graph.named_buffers():
        if name.endswith("threshold"):
            threshold.fill_(1e9)  # nothing is evicted from now on
    server.step([(0, 0, prompt)])
    with pytest.raises(OutOfPagesError, match="dms_pool_ratio, max_batch_size or max_seq_len"):
        server.step([(1, 0, prompt)])


class Waits(TorchDispatchMode):
    """How many numbers were read from these tensors: on a GPU, each would wait for it."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.places = {x.untyped_storage().data_ptr() for x in tensors}
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].untyped_storage().data_ptr() in self.places
        return op(*args, **(kwargs or {}))


def test_a_step_of_single_tokens_waits_for_no_layer_and_the_next_one_says_what_was_lost(
    llama_graph: Any, double: SimpleNamespace
) -> None:
    server = engine(double, llama_graph)
    server.step([(0, 0, [5, 6, 7])])
    state = [server.caches[name] for name in list(server.caches)[: len(STATE)]]
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 2, 8)
    evict = torch.zeros(1, 1, 2, dtype=torch.bool)
    info, bounds = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1])

    def single(position: int) -> None:
        rest = (torch.tensor([position]), torch.tensor([0]))
        given = (info, bounds, *rest, *state, 1.0, WINDOW, 0, None, None)
        # Not through the op, which hides what happens within.
        names = (*METADATA, *STATE, *ops.CONSTANTS)
        ops._cached_gated_attention(q, k, k, evict, **dict(zip(names, given, strict=True)))

    with Waits(*state) as waits:
        single(3)
    assert waits.count == 0
    state[STATE.index("counters")][1] = -1
    single(4)
    with pytest.raises(OutOfPagesError, match="dms_pool_ratio"):
        single(5)


def test_metadata_that_the_cache_cannot_follow_is_refused(
    llama_graph: Any, double: SimpleNamespace
) -> None:
    server = engine(double, llama_graph)
    server.step([(0, 0, [5, 6, 7])])
    with pytest.raises(ValueError, match="position 8 in slot 0, whose cache has seen 3 tokens"):
        server.step([(0, 8, [5, 6])])
    q, kv, evict = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2).bool()
    drafts = torch.tensor([0, 0, 1, 2, 0, 0])
    rest = (torch.tensor([0, 2]), torch.tensor([3]), torch.tensor([0]))
    state = [server.caches[name] for name in list(server.caches)[: len(STATE)]]
    with pytest.raises(ValueError, match="speculative_config must be unset"):
        CACHED(q, kv, kv, evict, drafts, *rest, *state, 1.0, WINDOW, 0, None, None)


# The version gate.


def test_without_tensorrt_llm_the_message_says_what_is_needed() -> None:
    assert importlib.util.find_spec("tensorrt_llm") is None, "remove it to run this test"
    with pytest.raises(backend.BackendError, match="TensorRT-LLM >=1.3.0rc0,<1.4 is needed"):
        register()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"version": "1.2.1"}, "1.2.1 is installed; accepted: >=1.3.0rc0,<1.4"),
        ({"version": "1.4.0"}, "1.4.0 is installed"),
        ({"BatchInfo": None}, "attention_interface lacks BatchInfo"),
        ({"ModelFactoryRegistry": None}, "models.hf lacks ModelFactoryRegistry"),
        ({"AutoModelForCausalLMFactory": object}, "has no _build_model"),
        ({"abstract": (*autodeploy.ABSTRACT, "get_more")}, "also wants get_more"),
        ({"BatchInfo": lambda x: 1 / 0}, "BatchInfo cannot be read"),
    ],
)
def test_another_version_or_interface_is_refused(
    found: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = autodeploy.install(monkeypatch, **found)
    with pytest.raises(backend.BackendError, match=message):
        register()
    assert not double.AttentionRegistry.has("dms")


def test_numbers_of_the_batch_that_moved_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2026, the third number was that of the sequences that decode."""

    class Older(autodeploy.BatchInfo):
        def get_num_sequences(self) -> tuple[int, ...]:
            return (*self._batch_info[:1].tolist(), 0, int(self._batch_info[2]))

    autodeploy.install(monkeypatch, BatchInfo=Older)
    with pytest.raises(backend.BackendError, match="BatchInfo reads"):
        register()


def test_another_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    autodeploy.install(monkeypatch)
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(backend.BackendError, match="found 4.57.1: TensorRT-LLM pins a version"):
        register()


def test_the_plugin_of_an_exported_directory_registers_once(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = dms.export(llama, tmp_path / "out", "trtllm")
    double = autodeploy.install(monkeypatch)
    for _ in range(2):  # trtllm-serve imports it in every process that it starts
        exec((place / PLUGIN / "__init__.py").read_text(), {})
    assert double.AttentionRegistry.has("dms") and double.ModelFactoryRegistry.has("modelopt_dms")


def test_a_checkpoint_without_gates_is_not_built(double: SimpleNamespace, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(backend.BackendError, match="is not a DMS checkpoint"):
        double.ModelFactoryRegistry.get(backend.FACTORY)(tmp_path)._build_model("meta")
