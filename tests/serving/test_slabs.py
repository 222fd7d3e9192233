# SPDX-License-Identifier: Apache-2.0
"""KV rows in slabs: the attention of ragged requests equals the mask over whole sequences, whatever the blocks are."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from modelopt_dms.kernels.layout import PAGE, OutOfPagesError
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.serving.vllm.accounting import Ledger, least_blocks
from modelopt_dms.serving.vllm.slabs import Grant, NewTokens, Rules, Slabs, SlabShape

LAYERS, HEADS, GROUP, DIM, BLOCKS = 2, 2, 2, 8, 60
SCORING = Scoring(DIM**-0.5)


class Bench:
    """Requests of random tokens, a pool, and slabs that follow a ledger."""

    def __init__(self, rules: Rules, evicted: float, limit: int = BLOCKS) -> None:
        shape = SlabShape(LAYERS, HEADS, requests=4)
        pages = torch.zeros((BLOCKS + 1) * LAYERS * HEADS, PAGE, 2 * DIM)
        self.slabs = Slabs(*pages.split(DIM, dim=-1), shape, rules)
        least = least_blocks(rules.window, rules.protect_first, PAGE)
        self.ledger = Ledger(PAGE, limit, least)
        self.rules, self.evicted = rules, evicted
        self.free = list(range(1, BLOCKS + 1))
        self.blocks: dict[str, list[int]] = defaultdict(list)
        self.tokens: dict[str, list[NewTokens]] = {}
        self.outs: dict[str, list[list[Tensor]]] = {}
        self.seen: dict[str, int] = {}

    def arrive(self, name: str, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def rows(heads: int) -> Tensor:
            return torch.randn(length, heads, DIM, generator=generator)

        self.tokens[name] = [
            NewTokens(
                rows(HEADS * GROUP),
                rows(HEADS),
                rows(HEADS),
                torch.rand(length, HEADS, generator=generator) < self.evicted,
            )
            for _ in range(LAYERS)
        ]
        self.outs[name] = [[] for _ in range(LAYERS)]
        self.seen[name] = 0

    def step(self, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            for _ in range(self.ledger.grow(name, self.seen[name] + size)):
                self.blocks[name].append(self.free.pop())
        grants = {
            x: Grant(self.ledger[x].epoch, tuple(self.blocks[x]), self.ledger.is_capped(x))
            for x in self.seen
            if x in self.ledger
        }
        self.slabs.update(grants, [])
        self.slabs.check_integrity()
        single = [x for x, size in sizes.items() if size == 1]
        for layer in range(LAYERS):
            for name in sizes.keys() - set(single):
                part = slice(self.seen[name], self.seen[name] + sizes[name])
                new = self.tokens[name][layer][part]
                self.outs[name][layer].append(self.slabs.chunk(layer, name, new, SCORING))
            if single:
                each = [
                    self.tokens[x][layer][slice(self.seen[x], self.seen[x] + 1)] for x in single
                ]
                fields = (
                    torch.cat([getattr(x, k) for x in each]) for k in ("q", "k", "v", "evict")
                )
                out = self.slabs.decode(layer, single, NewTokens(*fields), SCORING)
                for i, name in enumerate(single):
                    self.outs[name][layer].append(out[i : i + 1])
        for name, size in sizes.items():
            self.seen[name] += size
            epoch, seen, usage = self.slabs.usage(name)
            assert seen == self.seen[name]
            for _ in range(self.ledger.settle(name, epoch, seen, {"0": usage})):
                self.free.append(self.blocks[name].pop())

    def error(self, name: str) -> float:
        """Largest difference of outputs from attention under the mask of the whole sequence."""
        worst = 0.0
        for layer in range(LAYERS):
            out, new = torch.cat(self.outs[name][layer]), self.tokens[name][layer]
            T = len(out)
            evict = new.evict[:T].clone()
            evict[: self.rules.protect_first + self.rules.shift] = False
            if self.rules.shift:
                evict = torch.cat([evict[1:], torch.zeros(1, HEADS, dtype=torch.bool)])
            at = torch.arange(T)
            age = at[:, None] - at
            for h in range(HEADS * GROUP):
                kv = h // GROUP
                scores = new.q[:T, h] @ new.k[:T, kv].T * SCORING.scale
                gone = (age < 0) | ((age > self.rules.window) & evict[None, :, kv])
                wanted = scores.masked_fill(gone, float("-inf")).softmax(-1) @ new.v[:T, kv]
                worst = max(worst, (out[:, h] - wanted).abs().max().item())
        return worst


@pytest.mark.parametrize("shift", [0, 1])
def test_ragged_requests_attend_as_under_the_mask_of_the_whole_sequence(shift: int) -> None:
    bench = Bench(Rules(window=20, shift=shift, protect_first=2), evicted=0.8)
    for seed, name in enumerate("abc"):
        bench.arrive(name, 700, seed)
    for sizes in ({"a": 200}, {"b": 333, "a": 1}, {"a": 150, "b": 1, "c": 1}, {"c": 90}):
        bench.step(sizes)
    for _ in range(150):
        bench.step(dict.fromkeys("abc", 1))
    assert max(bench.error(x) for x in "abc") < 1e-5
    dense = sum(-(-x // PAGE) for x in bench.seen.values())
    held = sum(map(len, bench.blocks.values()))
    assert held <= 0.5 * dense
    assert held + len(bench.free) == BLOCKS


def test_a_capped_request_loses_its_oldest_unprotected_tokens() -> None:
    rules, limit = Rules(window=20, shift=0, protect_first=3), 3
    bench = Bench(rules, evicted=0.0, limit=limit)
    bench.arrive("a", 700, seed=5)
    for size in (150, 260, *[1] * 100):
        bench.step({"a": size})
        assert len(bench.blocks["a"]) <= limit
    _, seen, usage = bench.slabs.usage("a")
    assert usage.pages <= limit * LAYERS * HEADS
    assert usage.forced > 0
    live = bench.slabs.live[0]
    for layer in range(LAYERS):
        for head in range(HEADS):
            tokens = torch.arange(int(live[layer, head]))
            pages = bench.slabs.table[0, layer, head, tokens // PAGE].long()
            held = bench.slabs.positions[pages, tokens % PAGE].sort().values.tolist()
            newest = len(held) - rules.protect_first
            assert held == [0, 1, 2, *range(seen - newest, seen)]
            assert newest > rules.window


def test_a_slab_that_is_too_small_is_an_error_where_lists_must_not_be_cut() -> None:
    bench = Bench(Rules(window=20, shift=0, protect_first=0), evicted=0.0)
    bench.arrive("a", 700, seed=6)
    bench.slabs.update({"a": Grant(epoch=1, blocks=(1,))}, [])
    with pytest.raises(OutOfPagesError, match="the 1 blocks of a request are used up"):
        bench.slabs.chunk(0, "a", bench.tokens["a"][0][slice(300)], SCORING)


def test_rows_of_a_request_that_left_are_free_for_the_next() -> None:
    bench = Bench(Rules(window=20, shift=0, protect_first=0), evicted=0.5)
    for life in range(6):
        name = f"r{life}"
        bench.arrive(name, 100, seed=life)
        bench.step({name: 70})
        bench.step({name: 1})
        assert bench.error(name) < 1e-5
        bench.ledger.close(name)
        bench.free += bench.blocks.pop(name)
        del bench.seen[name]
        bench.slabs.update({}, [name])
    assert len(bench.free) == BLOCKS and not bench.slabs.held
