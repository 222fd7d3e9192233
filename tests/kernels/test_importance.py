# SPDX-License-Identifier: Apache-2.0
"""What evicting a key costs, against the eviction carried out, key by key, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_dms.kernels import importance
from modelopt_dms.kernels.importance import ResidualStream, output_change
from modelopt_dms.kernels.reference import Scoring


def evicted_one_by_one(q, k, v, maps, residual, lengths, window, scoring):
    """The relative squared change of each head's projected output, with one key at a time left out."""
    (B, H, T, _), K = q.shape, k.shape[1]
    found = torch.zeros(B, K, T, dtype=torch.float64)
    for b in range(B):
        n = int(lengths[b])
        for h in range(H):
            scores = q[b, h, :n].double() @ k[b, h // (H // K), :n].double().T * scoring.scale
            if scoring.softcap is not None:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            if scoring.sinks is not None:
                column = scoring.sinks[h].double().expand(n, 1)
                scores = torch.cat([scores, column], dim=1)
            values = v[b, h // (H // K), :n].double()
            for i in range(n):
                seen = scores[i].clone()
                seen[i + 1 : n] = float("-inf")
                out = seen.softmax(-1)[:n] @ values
                for j in range(i - window):
                    without = seen.clone()
                    without[j] = float("-inf")
                    change = maps[h].double() @ (out - without.softmax(-1)[:n] @ values)
                    found[b, h // (H // K), j] += change.square().sum() / residual[b, i]
    return found


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 14),
    window=st.integers(1, 8),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    at_a_time=st.sampled_from([1, 64, 1 << 20]),
)
def test_importance_is_the_change_of_the_output_when_a_key_is_evicted(
    seed, kv_heads, group, length, window, softcap, sinks, at_a_time
):
    generator = torch.Generator().manual_seed(seed)
    H = kv_heads * group
    # Small scores: no key has nearly all of the weight, where the change is bounded.
    q = 0.3 * torch.randn(2, H, length, 8, generator=generator)
    k = torch.randn(2, kv_heads, length, 8, generator=generator)
    v = torch.randn(2, kv_heads, length, 4, generator=generator)
    maps = torch.randn(H, 6, 4, generator=generator)
    residual = 0.5 + torch.rand(2, length, generator=generator)
    lengths = torch.randint(1, length + 1, (2,), generator=generator)
    scoring = Scoring(0.35, softcap, torch.randn(H, generator=generator) if sinks else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "SCORES", {"cpu": at_a_time})
        found = output_change(
            q, k, v, ResidualStream(maps.mT @ maps, residual), lengths, window, scoring
        )
    expected = evicted_one_by_one(q, k, v, maps, residual, lengths, window, scoring)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-3)


def test_memory_does_not_grow_with_the_square_of_the_length(monkeypatch):
    """No matrix of scores is larger than the limit, whatever the length."""
    sizes = []
    whole = importance._weights

    def spy(*args):
        sizes.append(whole(*args).numel())
        return whole(*args)

    monkeypatch.setattr(importance, "_weights", spy)
    monkeypatch.setattr(importance, "SCORES", {"cpu": 4096})
    q, k, v = (torch.randn(1, heads, 512, 4) for heads in (4, 2, 2))
    output_change(
        q,
        k,
        v,
        ResidualStream(torch.eye(4).expand(4, -1, -1), torch.ones(1, 512)),
        torch.tensor([512]),
        16,
        Scoring(0.5),
    )
    assert max(sizes) <= 4096 < 512 * 512
