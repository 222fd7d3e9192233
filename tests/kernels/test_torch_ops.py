# SPDX-License-Identifier: Apache-2.0
"""The kernels as torch.library ops: their schemas are honest, and the compiler passes through them."""

from typing import Any

import pytest
import torch
from families import build_dms, tokens
from paged_oracle import FORMATS
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import modelopt_dms as dms
from modelopt_dms.kernels import dispatch, library
from modelopt_dms.kernels.gating import Decided, LinearGate
from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.reference import Prompt, Scoring
from modelopt_dms.kvcache.hf_cache import kv_stats

B, K, G, D, T = 2, 2, 2, 16, 5
SCORING = Scoring(D**-0.5)
# What an op promises: its schema, its fake kernel, and its gradient's registration.
PROMISES = ("test_schema", "test_faketensor", "test_autograd_registration")
KERNELS = library.kernel_function


def filled(name: str = "plain") -> tuple[PagePool, PageTables]:
    """Lists of a few tokens."""
    formats = FORMATS[name]
    layouts = [RowLayout.of(x, D, torch.float32) for x in formats]
    pool = PagePool.make(9, *layouts, torch.device("cpu"))
    lists = PageTables.make(B, K, 2, 3, 0, torch.ones(B, dtype=torch.bool), formats)
    evict = torch.rand(B, K, T) < 0.5
    dispatch.pack(torch.randn(B, K, T, D), torch.randn(B, K, T, D), evict, None, pool, lists)
    return pool, lists


def arguments(name: str, rows: str = "plain") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an op by its name, on rows of a format."""
    torch.manual_seed(0)
    pool, lists = filled(rows)
    state, scored = library.state(pool, lists), library.scored(SCORING)
    q, k, v = (torch.randn(B, n, T, D) for n in (K * G, K, K))
    evict = torch.rand(B, K, T) < 0.5
    keep = torch.randn(B, K, T)
    gate = {"features": torch.randn(B, 8), "weight": torch.randn(K, 8), "evict": None}
    gate |= {"threshold": torch.zeros(K), "positions": torch.zeros(1, dtype=torch.long)}
    gate |= {"scale": 1.0, "offset": 0.0, "protect": 0}
    chunk = {"starts": None, "first": lists.seen[:, 0].contiguous(), "expiry": None}
    training = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), keep.requires_grad_())
    return {
        "decode": ((q[:, :, 0].detach(),), state | scored),
        "append_token": ((k[:, :, 0].detach(), v[:, :, 0].detach()), state | gate),
        "pack": ((k.detach(), v.detach(), evict, None), state),
        "attend_chunk": ((q.detach(), k.detach(), v.detach(), evict), chunk | state | scored),
        "prefill": ((*training, None, None, 1, SCORING.scale, None), {}),
    }[name]


@pytest.mark.parametrize("name", ["decode", "append_token", "pack", "attend_chunk", "prefill"])
def test_an_op_keeps_what_its_schema_promises(name: str) -> None:
    args, kwargs = arguments(name)
    op = getattr(torch.ops.modelopt_dms, name).default
    opcheck(op, args, kwargs, test_utils=PROMISES)


def strided(x: Any) -> Any:
    """The same numbers with the last two dims apart in memory, as transposed projections have them."""
    if not isinstance(x, Tensor) or x.ndim < 3:
        return x
    found = x.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
    return found.requires_grad_(x.requires_grad)


@pytest.mark.parametrize(
    "name", ["decode", "append_token", "pack", "attend_chunk", "prefill", "prefill_backward"]
)
def test_results_of_strided_inputs_lie_as_the_fake_says(name: str) -> None:
    if name == "prefill_backward":
        args, kwargs = arguments("prefill")
        out, lse = torch.ops.modelopt_dms.prefill(*args)
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in (out, out, lse, *args))
    else:
        args, kwargs = arguments(name)
    op = getattr(torch.ops.modelopt_dms, name).default
    opcheck(op, tuple(map(strided, args)), kwargs, test_utils=PROMISES)


@pytest.mark.parametrize("rows", ["plain", "fp8 rows", "mixed"])
@pytest.mark.parametrize("name", ["decode", "append_token", "pack", "attend_chunk"])
def test_on_a_cpu_without_triton_an_op_is_its_reference(
    name: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, found = getattr(torch.ops.modelopt_dms, name), []
    for interpreted in (True, False):
        args, kwargs = arguments(name, rows)
        monkeypatch.setattr(library, "interpreting", lambda x=interpreted: x)
        monkeypatch.setattr(library, "kernel_function", KERNELS if interpreted else None)
        out = op(*args, **kwargs)
        changed = [kwargs[x].clone() for x in ("live", "seen", "ring_slot", "ring_evict", "table")]
        found.append([*changed, *([] if out is None else [out])])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_training_attention_compiles_whole_with_its_gradient() -> None:
    args, _ = arguments("prefill")
    tensors = args[:4]

    def loss(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (
            dispatch.prefill_attention(Prompt(q, k, v, keep, 1), SCORING, impl="triton")
            .square()
            .sum()
        )

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*tensors), tensors)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_a_decode_step_exports_with_its_ops() -> None:
    pool, lists = filled()

    class Step(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor) -> Tensor:
            dispatch.append_token(k, v, Decided(evict), pool, lists, impl="triton")
            return dispatch.decode_attention(q, pool, lists, SCORING, impl="triton")

    q, k, v = torch.randn(B, K * G, D), torch.randn(B, K, D), torch.randn(B, K, D)
    program = torch.export.export(Step(), (q, k, v, torch.zeros(B, K, dtype=torch.bool)))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"modelopt_dms.append_token.default", "modelopt_dms.decode.default"} <= called


def test_a_model_decodes_under_torch_compile_without_a_graph_break() -> None:
    model, ids = build_dms("qwen3", base={"num_hidden_layers": 1}), tokens(2, 12)
    found = []
    for compiled in (False, True):
        cache = dms.DMSCache(model, batch_size=2, max_length=PAGE, impl="triton")
        with torch.no_grad():
            model(ids[:, :9], past_key_values=cache)
            step = model
            if compiled:
                step = torch.compile(model, backend="eager", fullgraph=True)
            logits = [
                step(ids[:, t : t + 1], position_ids=torch.tensor([[t]]), past_key_values=cache)
                for t in range(9, 12)
            ]
        found.append((torch.cat([x.logits for x in logits], 1), kv_stats(cache).resident_tokens))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_kernels_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="impl='triton' needs a CUDA device, got 'cpu'"):
        dispatch.choose("triton", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(library, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs Triton"):
        dispatch.choose("triton", torch.device("cuda"))
    assert dispatch.choose("auto", torch.device("cpu")) == "reference"


@pytest.mark.parametrize(
    ("capability", "fits"),
    [
        ((7, 5), False),
        ((8, 0), False),
        ((8, 9), False),
        ((9, 0), True),
        ((10, 3), True),
        ((12, 0), False),
    ],
)
def test_gpus_that_the_kernels_do_not_fit_compute_in_pytorch(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dispatch.kernels_fit(capability) == fits
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    if fits:
        assert dispatch.choose("auto", torch.device("cuda")) == "triton"
        return
    with pytest.warns(UserWarning, match=r"9\.0 to 11\.x .* GPU has \d+\.\d: plain PyTorch"):
        assert dispatch.choose("auto", torch.device("cuda")) == "reference"
    with pytest.raises(ValueError, match=r"9\.0 to 11\.x .* GPU has .* 'auto', 'reference'"):
        dispatch.choose("triton", torch.device("cuda"))


def test_masks_that_kernels_do_not_know_are_refused() -> None:
    causal = torch.ones(6, 6).tril().bool()[None, None]
    assert dispatch.starts_of(causal, 2).tolist() == [[0] * 6] * 2
    documents = causal.clone()
    documents[..., 3:, :3] = False
    assert dispatch.starts_of(documents, 1).tolist() == [[0, 0, 0, 3, 3, 3]]
    documents[..., 5, 4] = False
    with pytest.raises(ValueError, match="use impl='reference'"):
        dispatch.starts_of(documents, 1)


class Copies(TorchDispatchMode):
    """The largest tensor of more than a byte a number that anything made, in numbers."""

    largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.element_size() > 1:
            self.largest = max(self.largest, out.numel())
        return out


def test_starts_are_derived_without_a_wider_copy_and_once_for_all_layers() -> None:
    mask = torch.ones(2, 1, 64, 64).tril().bool()
    with Copies() as copies:
        starts = dispatch.starts_of(mask, 2)
    assert copies.largest < mask.numel() // 8
    assert dispatch.starts_of(mask, 2) is starts
    mask[:, :, 30:, :30] = False
    again = dispatch.starts_of(mask, 2)
    assert again is not None and again[0].tolist() == [0] * 30 + [30] * 34


@torch.no_grad()
def test_layers_of_one_forward_share_the_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, first_seen = [], dispatch._first_seen
    monkeypatch.setattr(dispatch, "_first_seen", lambda *a: asked.append(a) or first_seen(*a))
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[1, :5] = 0
    model = build_dms("llama")
    cache = dms.DMSCache(model, batch_size=2, max_length=PAGE, impl="triton")
    model(tokens(2, 12), attention_mask=padding, past_key_values=cache)
    assert len(asked) == 1


def test_a_linear_gate_and_decisions_append_the_same() -> None:
    torch.manual_seed(1)
    gate = LinearGate(
        torch.randn(B, 8),
        torch.randn(K, 8),
        torch.zeros(K),
        torch.ones(1, dtype=torch.long),
        2.0,
        0.1,
        0,
    )
    rows = torch.randn(2, B, K, D)
    held = []
    for given in (gate, Decided(gate.decide(K))):
        torch.manual_seed(2)
        pool, lists = filled()
        dispatch.append_token(*rows, given, pool, lists, impl="triton")
        held.append(lists)
    for name in ("live", "seen", "ring_slot", "ring_evict", "table"):
        assert torch.equal(getattr(held[0], name), getattr(held[1], name))
