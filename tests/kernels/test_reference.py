# SPDX-License-Identifier: Apache-2.0
"""The ops against ALGORITHM's formula in float64, over generated eviction patterns."""

import math
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from families import build_dms, open_gates
from hypothesis import given
from torch import Tensor

from modelopt_dms.gates.gate import set_relaxation
from modelopt_dms.kernels import reference
from modelopt_dms.kernels.reference import (
    Prompt,
    Scoring,
    assign_slots,
    masked_attention,
    merge_partials,
    partial_attention,
    prefill_attention,
    prefill_partial,
    shift_decisions,
    with_sinks,
)
from modelopt_dms.modeling.convert import dms_modules

NEVER = float("-inf")


@dataclass
class Case:
    """Tensors of one attention call; q [B, H, T, D], k and v [B, K, T, D], log_keep [B, K, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_keep: Tensor
    window: int
    mask: Tensor | None
    scoring: Scoring

    @property
    def prompt(self) -> Prompt:
        """What attends."""
        return Prompt(self.q, self.k, self.v, self.log_keep, self.window, self.mask)


@st.composite
def cases(draw: st.DrawFn, soft: bool = False) -> Case:
    """Shapes, an eviction pattern, a window, padding or document borders, soft cap and sinks."""
    B, K, G, T = (draw(st.integers(1, n)) for n in (2, 3, 3, 9))
    D, Dv = draw(st.sampled_from([(4, 4), (6, 3)]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rate = draw(st.sampled_from([0.0, 0.5, 1.0]))
    if soft:
        log_keep = torch.nn.functional.logsigmoid(-3 * torch.randn(B, K, T))
    else:
        log_keep = torch.zeros(B, K, T).masked_fill(torch.rand(B, K, T) < rate, NEVER)
    mask = draw(st.sampled_from([None, "causal", "left", "right", "documents"]))
    capped, sunk = draw(st.booleans()), draw(st.booleans())
    return Case(
        q=torch.randn(B, K * G, T, D) * 2,
        k=torch.randn(B, K, T, D),
        v=torch.randn(B, K, T, Dv),
        log_keep=log_keep,
        window=draw(st.sampled_from([1, 2, 4, T, T + 3])),
        mask=None if mask is None else make_mask(mask, B, T),
        scoring=Scoring(0.7, 1.5 if capped else None, torch.randn(K * G) if sunk else None),
    )


def make_mask(kind: str, B: int, T: int) -> Tensor:
    """A model's own mask [B, 1, T, T]: causal, and no padding or other document."""
    seen = torch.ones(T, T, dtype=torch.bool).tril().repeat(B, 1, 1)
    cut = T // 2
    if kind == "left":
        seen[-1, :, :cut] = False
    elif kind == "right":
        seen[-1, :, T - cut :] = False
    elif kind == "documents":
        seen[:, cut:, :cut] = False
    return seen[:, None]


def formula(case: Case) -> Tensor:
    """ALGORITHM.md, one query and one key at a time, in float64: output [B, H, T, Dv]."""
    q, k, v, log_keep = (x.double() for x in (case.q, case.k, case.v, case.log_keep))
    B, H, T, _ = q.shape
    G = H // k.shape[1]
    out = q.new_zeros(B, H, T, v.shape[-1])
    for b in range(B):
        for h in range(H):
            for i in range(T):
                scores, values = [], []
                for j in range(i + 1):
                    if case.mask is not None and not case.mask[b, 0, i, j]:
                        continue
                    score = q[b, h, i] @ k[b, h // G, j] * case.scoring.scale
                    if case.scoring.softcap is not None:
                        score = case.scoring.softcap * torch.tanh(score / case.scoring.softcap)
                    if i - j > case.window:
                        score = score + log_keep[b, h // G, j]
                    scores.append(score)
                    values.append(v[b, h // G, j])
                if case.scoring.sinks is not None:
                    scores.append(case.scoring.sinks[h].double())
                    values.append(torch.zeros_like(v[0, 0, 0]))
                if scores:
                    out[b, h, i] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


def real_rows(case: Case) -> Tensor:
    """True [B, 1, T, 1] where a query is a token, not padding."""
    if case.mask is None:
        return torch.ones(len(case.q), 1, case.q.shape[2], 1, dtype=torch.bool)
    return case.mask.diagonal(dim1=-2, dim2=-1)[..., None].expand(len(case.q), -1, -1, -1)


def assert_equal_on_tokens(case: Case, out: Tensor, expected: Tensor, atol: float) -> None:
    """Equal for every token; finite for padding, whose value nobody reads."""
    assert bool(out.isfinite().all())
    seen = real_rows(case)
    got, want = (torch.where(seen, x.double(), 0.0) for x in (out, expected))
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@given(cases())
def test_prefill_under_hard_decisions_equals_the_formula(case: Case) -> None:
    out = prefill_attention(case.prompt, case.scoring)
    assert_equal_on_tokens(case, out, formula(case), 2e-6)


@given(cases(soft=True))
def test_prefill_under_soft_decisions_equals_the_formula(case: Case) -> None:
    out = prefill_attention(case.prompt, case.scoring)
    assert_equal_on_tokens(case, out, formula(case), 2e-6)


@given(cases(), st.integers(1, 4))
def test_the_block_size_changes_nothing(case: Case, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "QUERY_ROWS", rows)
        out = prefill_attention(case.prompt, case.scoring)
        partial = with_sinks(*prefill_partial(case.prompt, case.scoring), case.scoring.sinks)
    expected = formula(case)
    assert_equal_on_tokens(case, out, expected, 2e-6)
    assert_equal_on_tokens(case, partial, expected, 2e-6)


@given(cases())
def test_without_decisions_prefill_is_plain_attention(case: Case) -> None:
    case.log_keep.zero_()
    expected = formula(case)
    out = prefill_attention(case.prompt, case.scoring)
    assert_equal_on_tokens(case, out, expected, 2e-6)


@given(cases())
def test_float64_in_is_float64_all_the_way(case: Case) -> None:
    case.q, case.k, case.v = case.q.double(), case.k.double(), case.v.double()
    out = prefill_attention(case.prompt, case.scoring)
    tolerance = 1e-12 if case.scoring.sinks is None else 1e-6
    assert_equal_on_tokens(case, out, formula(case), tolerance)


@given(cases(soft=True), st.sampled_from([2, 3, 128]))
def test_gradients_equal_float64_autograd_of_the_formula(case: Case, rows: int) -> None:
    inputs = (case.q, case.k, case.v, case.log_keep)
    single = [x.clone().requires_grad_() for x in inputs]
    seen = real_rows(case)
    with pytest.MonkeyPatch.context() as patch:
        # With several blocks, the backward pass makes their scores anew.
        patch.setattr(reference, "QUERY_ROWS", rows)
        patch.setattr(reference, "KEPT_BLOCKS", 1)
        out = prefill_attention(Prompt(*single, case.window, case.mask), case.scoring)
        weights = torch.randn_like(out) * seen
        (out * weights).sum().backward()
    double = [x.double().requires_grad_() for x in inputs]
    exact = formula(Case(*double, case.window, case.mask, case.scoring))
    (exact * weights.double()).sum().backward()
    for got, want in zip(single, double, strict=True):
        expected = torch.zeros_like(want) if want.grad is None else want.grad
        torch.testing.assert_close(got.grad.double(), expected, atol=1e-5, rtol=0)


def test_what_training_keeps_does_not_grow_with_the_square_of_the_length() -> None:
    """Saved for the backward pass are inputs, not scores."""
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for length in (1024, 2048):
        q, k, v = (torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3))
        log_keep = torch.full((1, 2, length), -1.0, requires_grad=True)
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            prefill_attention(Prompt(q, k, v, log_keep, 8), Scoring(0.5))
        assert sum(sizes.values()) < 200 * length * 4, length


def test_a_fully_closed_gate_gives_finite_gradients() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    z = torch.full((1, 2, 8), 1e4, requires_grad=True)
    log_keep = torch.nn.functional.logsigmoid(-z)
    out = prefill_attention(Prompt(q, k, v, log_keep, 2), Scoring(0.5))
    out.square().sum().backward()
    assert bool(out.isfinite().all())
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


@given(cases(), st.integers(0, 8))
def test_a_sequence_cut_in_two_merges_to_the_whole(case: Case, at: int) -> None:
    case.mask = None
    B, H, T, _ = case.q.shape
    K = case.k.shape[1]
    at = at % T
    tail = (x[:, :, at:] for x in (case.q, case.k, case.v, case.log_keep))
    new = prefill_partial(Prompt(*tail, case.window), case.scoring)
    queries = torch.arange(at, T)
    parts = []
    for b in range(B):
        for h in range(K):
            # The list as a cache holds it: expired tokens are gone, marked ones in the window are pending.
            positions = torch.arange(at)
            marked = case.log_keep[b, h, :at] == NEVER
            held = positions[(at - 1 - positions <= case.window) | ~marked[positions]]
            held = held[torch.randperm(len(held))]
            expired = marked[held] & (queries[:, None] - held > case.window)
            bias = torch.zeros(len(queries), len(held)).masked_fill(expired, NEVER)
            rows = case.q.unflatten(1, (K, -1))[b, h, :, at:]
            parts.append(
                partial_attention(rows, case.k[b, h, held], case.v[b, h, held], bias, case.scoring)
            )
    past = (
        torch.stack([x[0] for x in parts]).reshape(B, H, T - at, -1),
        torch.stack([x[1] for x in parts]).reshape(B, H, T - at),
    )
    expected = formula(case)[:, :, at:]
    for pair in ((*new, *past), (*past, *new)):
        out = with_sinks(*merge_partials(*pair), case.scoring.sinks)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@given(st.integers(1, 3), st.integers(0, 4), st.integers(0, 4), st.booleans(), st.integers(0, 99))
def test_merging_two_parts_equals_attention_over_both(
    T: int, left: int, right: int, capped: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    scoring = Scoring(0.5, 2.0 if capped else None)
    q, k, v = torch.randn(T, 4), torch.randn(left + right, 4), torch.randn(left + right, 3)
    a = partial_attention(q, k[:left], v[:left], None, scoring)
    b = partial_attention(q, k[left:], v[left:], None, scoring)
    out, lse = merge_partials(*a, *b)
    swapped, swapped_lse = merge_partials(*b, *a)
    whole, whole_lse = partial_attention(q, k, v, None, scoring)
    torch.testing.assert_close(out, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(swapped, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, whole_lse, atol=1e-6, rtol=0)
    torch.testing.assert_close(swapped_lse, whole_lse, atol=1e-6, rtol=0)
    if left + right == 0:
        assert bool((out == 0).all())
        assert bool((lse == NEVER).all())


def test_a_row_whose_keys_are_all_masked_is_an_empty_part() -> None:
    q, k, v = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3, 4)
    bias = torch.zeros(2, 3)
    bias[1] = NEVER
    out, lse = partial_attention(q, k, v, bias, Scoring(0.5))
    assert bool((out[1] == 0).all())
    assert lse[1] == NEVER
    scores = q[0].double() @ k.double().T * 0.5
    torch.testing.assert_close(lse[0].double(), scores.logsumexp(-1), atol=1e-6, rtol=0)


def test_log_sum_exp_survives_extreme_scores() -> None:
    q, k = torch.tensor([[200.0], [-200.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    v = torch.randn(3, 2)
    out, lse = partial_attention(q, k, v, None, Scoring(1.0))
    scores = q.double() @ k.double().T
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), atol=1e-5, rtol=0)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention_of_padded_lists_equals_the_formula_list_by_list(
    lengths: list[int], H: int, T: int, capped: bool, sunk: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    N, S = len(lengths), max(lengths) + 1
    scoring = Scoring(0.6, 1.5 if capped else None, torch.ones(1) if sunk else None)
    sinks = torch.randn(N, H) if sunk else None
    q = torch.randn(N, H, T, 4)
    k, v = torch.randn(N, 1, S, 4), torch.randn(N, 1, S, 3)
    hidden = torch.arange(S) >= torch.tensor(lengths)[:, None]
    bias = torch.zeros(N, 1, T, S).masked_fill(hidden[:, None, None], NEVER)
    out = masked_attention(q, k, v, bias, scoring, sinks)
    for n, h in ((n, h) for n in range(N) for h in range(H)):
        scores = q[n, h].double() @ k[n, 0, : lengths[n]].double().T * 0.6
        rows = v[n, 0, : lengths[n]].double()
        if capped:
            scores = 1.5 * torch.tanh(scores / 1.5)
        if sinks is not None:
            scores = torch.cat([scores, sinks[n, h].double().expand(T, 1)], dim=-1)
            rows = torch.cat([rows, torch.zeros(1, 3)])
        expected = scores.softmax(-1) @ rows
        torch.testing.assert_close(out[n, h].double(), expected, atol=2e-6, rtol=0)


def test_attention_of_lists_with_keys_for_every_head_equals_the_formula() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    out = masked_attention(q, k, v, torch.zeros(2, 1, 1, 5), Scoring(0.5))
    expected = (q @ k.transpose(2, 3) * 0.5).softmax(-1) @ v
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_shifted_decisions_govern_the_token_before() -> None:
    decided = torch.tensor([[True, False, True, True]])
    assert shift_decisions(decided, 0).tolist() == [[True, False, True, True]]
    assert shift_decisions(decided, 1).tolist() == [[False, True, True, False]]
    soft = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    assert shift_decisions(soft, 1).tolist() == [[-2.0, -3.0, 0.0]]


def test_a_slot_is_reused_only_if_its_token_was_marked() -> None:
    expired = torch.tensor([[3, 3, -1, -1]])
    marked = torch.tensor([[True, False, True, False]])
    live = torch.tensor([[7, 7, 2, 2]])
    slot, longer = assign_slots(expired, marked, live)
    assert slot.tolist() == [[3, 7, 2, 2]]
    assert longer.tolist() == [[7, 8, 3, 3]]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [B, n, T, D], halves rotated against each other."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


@pytest.mark.parametrize("training", [False, True], ids=["hard", "soft"])
def test_a_llama_layer_equals_its_float64_rewrite(training: bool) -> None:
    model = open_gates(build_dms("llama", seed=3))
    module = next(iter(dms_modules(model).values()))
    gate = module.dms_gate
    model.train(training)
    set_relaxation(model, None, tau=0.7)
    torch.manual_seed(0)
    B, T, H, K, D = 2, 14, 4, 2, 8
    x = torch.randn(B, T, 32)
    cos, sin = model.model.rotary_emb(x, torch.arange(T)[None])
    out = module(x, position_embeddings=(cos, sin), attention_mask=None)[0]

    x, cos, sin = x.double(), cos.double(), sin.double()
    z = 10.0 * x @ gate.weight.double().T - gate.offset - gate.threshold.double()  # [B, T, K]
    alpha = torch.sigmoid(z / 0.7) if training else (z > 0).double()
    log_keep = torch.log(1 - alpha).clamp(min=NEVER)

    def project(linear: torch.nn.Linear, heads: int) -> Tensor:
        return (x @ linear.weight.double().T).view(B, T, heads, D).transpose(1, 2)

    q = rotate(project(module.q_proj, H), cos, sin)
    k = rotate(project(module.k_proj, K), cos, sin)
    scoring = Scoring(1 / math.sqrt(D))
    attended = formula(
        Case(q, k, project(module.v_proj, K), log_keep.transpose(1, 2), gate.window, None, scoring)
    )
    expected = attended.transpose(1, 2).flatten(2) @ module.o_proj.weight.double().T
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)
