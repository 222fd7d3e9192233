# SPDX-License-Identifier: Apache-2.0
"""Requests of random tokens on slabs that follow a ledger, beside attention under the mask of whole sequences."""

from collections import defaultdict

import torch
from torch import Tensor

from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kernels.number_formats import RowFormat
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.serving.vllm.accounting import Ledger, least_blocks
from modelopt_dms.serving.vllm.drafts import Step
from modelopt_dms.serving.vllm.slabs import Grant, NewTokens, Rules, Slabs, SlabShape

LAYERS, HEADS, GROUP, DIM, BLOCKS = 2, 2, 2, 8, 60
SCORING = Scoring(DIM**-0.5)


class Bench:
    """Requests of random tokens, a pool, and slabs that follow a ledger."""

    def __init__(
        self, rules: Rules, evicted: float, limit: int = BLOCKS, form: RowFormat | None = None
    ) -> None:
        shape = SlabShape(LAYERS, HEADS, requests=4)
        dtype = torch.float32 if form is None else torch.uint8
        pages = torch.zeros((BLOCKS + 1) * LAYERS * HEADS, PAGE, 2 * DIM, dtype=dtype)
        self.slabs = Slabs(*pages.split(DIM, dim=-1), shape, rules, form)
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

    def step(self, sizes: dict[str, int], drafts: dict[str, tuple[int, int]] | None = None) -> None:
        """Let requests take in so many tokens, and some of them drafts: (tokens of it, how many were right)."""
        drafts = drafts or {}
        for name, size in sizes.items():
            longest = self.seen[name] + size + drafts.get(name, (0, 0))[0]
            for _ in range(self.ledger.grow(name, longest)):
                self.blocks[name].append(self.free.pop())
        grants = {
            x: Grant(self.ledger[x].epoch, tuple(self.blocks[x]), self.ledger.is_capped(x))
            for x in self.seen
            if x in self.ledger
        }
        steps = {x: Step(self.seen[x], drafts.get(x, (0, 0))[0]) for x in sizes}
        self.slabs.update(grants, [], steps)
        self.slabs.check_integrity()
        if drafts:
            self.verify(sizes, drafts)
        else:
            self.read(sizes)
        for name, size in sizes.items():
            tokens, right = drafts.get(name, (0, 0))
            self.seen[name] += size
            epoch, seen, usage = self.slabs.usage(name)
            assert seen == self.seen[name]
            for _ in range(self.ledger.settle(name, epoch, seen, {"0": usage})):
                self.free.append(self.blocks[name].pop())
            self.seen[name] += right

    def read(self, sizes: dict[str, int]) -> None:
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
                out = self.slabs.decode(layer, single, NewTokens.joined(each), SCORING)
                for i, name in enumerate(single):
                    self.outs[name][layer].append(out[i : i + 1])

    def verify(self, sizes: dict[str, int], drafts: dict[str, tuple[int, int]]) -> None:
        for layer in range(LAYERS):
            parts = []
            for name, size in sizes.items():
                tokens, right = drafts.get(name, (0, 0))
                assert size == 1 or not tokens
                start, end = self.seen[name], self.seen[name] + size + right
                # What was drafted wrongly: tokens from the end of the text.
                wrong = slice(-1, -1 - tokens + right, -1)
                index = torch.tensor(
                    [*range(start, end), *range(len(self.tokens[name][layer].q))[wrong]]
                )
                parts.append(self.tokens[name][layer][index])
            outs = self.slabs.verify(layer, list(sizes), parts, SCORING)
            for (name, size), out in zip(sizes.items(), outs, strict=True):
                right = drafts.get(name, (0, 0))[1]
                self.outs[name][layer].append(out[: size + right])

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
