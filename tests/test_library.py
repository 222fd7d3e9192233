# SPDX-License-Identifier: Apache-2.0
"""The kernels as torch.library ops: their schemas are honest, and the compiler passes through them."""

from typing import Any

import pytest
import torch
from families import build_dms, tokens
from paged_oracle import FORMATS
from torch import Tensor
from torch.library import opcheck

import modelopt_dms as dms
from modelopt_dms.cache import kv_stats
from modelopt_dms.ops import door, library
from modelopt_dms.ops.gating import Decided, LinearGate
from modelopt_dms.ops.paged import PAGE, LayerLists, PagePool, RowLayout
from modelopt_dms.ops.reference import Scoring

B, K, G, D, T = 2, 2, 2, 16, 5
SCORING = Scoring(D**-0.5)
# What an op promises: its schema, its fake kernel, and its gradient's registration.
PROMISES = ("test_schema", "test_faketensor", "test_autograd_registration")


def filled(name: str = "plain") -> tuple[PagePool, LayerLists]:
    """Lists of a few tokens."""
    formats = FORMATS[name]
    layouts = [RowLayout.of(x, D, torch.float32) for x in formats]
    pool = PagePool.make(9, *layouts, torch.device("cpu"))
    lists = LayerLists.make(B, K, 2, 3, 0, torch.ones(B, dtype=torch.bool), formats)
    evict = torch.rand(B, K, T) < 0.5
    door.pack(torch.randn(B, K, T, D), torch.randn(B, K, T, D), evict, None, pool, lists)
    return pool, lists


def arguments(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an op by its name."""
    torch.manual_seed(0)
    pool, lists = filled()
    state, scored = library._state(pool, lists), library._scored(SCORING)
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


def test_training_attention_compiles_whole_with_its_gradient() -> None:
    args, _ = arguments("prefill")
    tensors = args[:4]

    def loss(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return library.prefill_attention(q, k, v, keep, 1, None, SCORING).square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*tensors), tensors)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_a_decode_step_exports_with_its_ops() -> None:
    pool, lists = filled()

    class Step(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor) -> Tensor:
            library.append_token(k, v, Decided(evict), pool, lists)
            return library.decode_attention(q, pool, lists, SCORING)

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
        found.append((torch.cat([x.logits for x in logits], 1), kv_stats(cache).live_tokens))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_kernels_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_interpreting", lambda: False)
    with pytest.raises(ValueError, match="impl='triton' needs a CUDA device, got 'cpu'"):
        door.choose("triton", torch.device("cpu"))
    monkeypatch.setattr(door, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs Triton"):
        door.choose("triton", torch.device("cuda"))
    assert door.choose("auto", torch.device("cpu")) == "reference"


def test_masks_that_kernels_do_not_know_are_refused() -> None:
    causal = torch.ones(6, 6).tril().bool()[None, None]
    assert door.starts_of(causal, 2).tolist() == [[0] * 6] * 2
    documents = causal.clone()
    documents[..., 3:, :3] = False
    assert door.starts_of(documents, 1).tolist() == [[0, 0, 0, 3, 3, 3]]
    documents[..., 5, 4] = False
    with pytest.raises(ValueError, match="use impl='reference'"):
        door.starts_of(documents, 1)


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
        library.append_token(*rows, given, pool, lists)
        held.append(lists)
    for name in ("live", "seen", "ring_slot", "ring_evict", "table"):
        assert torch.equal(getattr(held[0], name), getattr(held[1], name))
