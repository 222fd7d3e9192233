# SPDX-License-Identifier: Apache-2.0
"""Future need, against its definition written out over whole [T, T] matrices in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_dms.ops import Scoring, future_need, need


def definition(q, k, v, lengths, window, scoring):
    """Largest and mean need, sequence by sequence and head by head."""
    (B, H, T, _), K = q.shape, k.shape[1]
    largest, mean = (
        torch.zeros(B, K, T, dtype=torch.float64),
        torch.zeros(B, K, T, dtype=torch.float64),
    )
    for b in range(B):
        n = int(lengths[b])
        for head in range(K):
            norms = v[b, head, :n].double().norm(dim=-1)
            paid = []
            for h in range(head * (H // K), (head + 1) * (H // K)):
                scores = q[b, h, :n].double() @ k[b, head, :n].double().T * scoring.scale
                if scoring.softcap is not None:
                    scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
                total = scores.exp().sum(-1, keepdim=True)
                if scoring.sinks is not None:
                    total = total + scoring.sinks[h].double().exp()
                paid.append(scores.exp() / total)
            paid = torch.stack(paid)
            for j in range(n):
                late = paid[:, j + window + 1 :, j]
                if late.numel():
                    largest[b, head, j] = late.max() * norms[j] / norms.mean()
                    mean[b, head, j] = late.mean() * norms[j] / norms.mean()
    return largest, mean


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 24),
    window=st.integers(1, 12),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    at_a_time=st.sampled_from([1, 64, 1 << 20]),
)
def test_need_is_what_its_definition_says(
    seed, kv_heads, group, length, window, softcap, sinks, at_a_time
):
    generator = torch.Generator().manual_seed(seed)
    H = kv_heads * group
    q = 3 * torch.randn(2, H, length, 8, generator=generator)
    k = torch.randn(2, kv_heads, length, 8, generator=generator)
    v = torch.randn(2, kv_heads, length, 4, generator=generator)
    lengths = torch.randint(1, length + 1, (2,), generator=generator)
    scoring = Scoring(0.35, softcap, torch.randn(H, generator=generator) if sinks else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(need, "SCORES", at_a_time)
        found = future_need(q, k, v, lengths, window, scoring)
    for ours, theirs in zip(found, definition(q, k, v, lengths, window, scoring), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)


def test_memory_does_not_grow_with_the_square_of_the_length(monkeypatch):
    """No matrix of scores is larger than the limit, whatever the length."""
    sizes = []
    whole = need._weights

    def spy(*args):
        sizes.append(whole(*args).numel())
        return whole(*args)

    monkeypatch.setattr(need, "_weights", spy)
    monkeypatch.setattr(need, "SCORES", 4096)
    q, k, v = (torch.randn(1, heads, 512, 4) for heads in (4, 2, 2))
    future_need(q, k, v, torch.tensor([512]), 16, Scoring(0.5))
    assert max(sizes) <= 4096 < 512 * 512
