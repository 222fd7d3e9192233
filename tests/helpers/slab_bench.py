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
from modelopt_dms.serving.vllm.slab_tables import Rules, SlabShape
from modelopt_dms.serving.vllm.slabs import Grant, NewTokens, Slabs

LAYERS, HEADS, GROUP, DIM, BLOCKS, DRAFTS = 2, 2, 2, 8, 60, 7
FIELDS = ("q", "k", "v", "evict")


class Bench:
    """Requests of random tokens, a pool, and slabs that follow a ledger."""

    def __init__(
        self,
        rules: Rules,
        evicted: float,
        limit: int = BLOCKS,
        form: RowFormat | None = None,
        impl: str = "reference",
        device: str = "cpu",
        dim: int = DIM,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = SlabShape(LAYERS, HEADS, requests=4, drafts=DRAFTS)
        stored = dtype if form is None else torch.uint8
        pages = (BLOCKS + 1) * LAYERS * HEADS
        dims = (dim, value_dim or dim)
        keys, values = (torch.zeros(pages, PAGE, x, dtype=stored, device=device) for x in dims)
        # What was there before is nobody's: rows behind a list's end are read and must not matter.
        for x in (keys, values):
            x.fill_(float("nan") if form is None else 0x7F)
        self.slabs = Slabs(keys, values, shape, rules, form, impl)
        self.device, self.dims, self.dtype = device, dims, dtype
        self.scoring = Scoring(dim**-0.5)
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

        def rows(heads: int, dim: int) -> Tensor:
            # As they are rounded, so that an oracle in float32 has the same numbers.
            return torch.randn(length, heads, dim, generator=generator).to(self.dtype).float()

        self.tokens[name] = [
            NewTokens(
                rows(HEADS * GROUP, self.dims[0]),
                rows(HEADS, self.dims[0]),
                rows(HEADS, self.dims[1]),
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
        for layer in range(LAYERS):
            self.read(layer, sizes, drafts)
        reports = self.slabs.usage(list(sizes))
        self.slabs.check_integrity()
        for name, size in sizes.items():
            right = drafts.get(name, (0, 0))[1]
            self.seen[name] += size
            epoch, seen, usage = reports[name]
            assert seen == self.seen[name]
            for _ in range(self.ledger.settle(name, epoch, seen, {"0": usage})):
                self.free.append(self.blocks[name].pop())
            self.seen[name] += right

    def read(self, layer: int, sizes: dict[str, int], drafts: dict[str, tuple[int, int]]) -> None:
        singles = [x for x, size in sizes.items() if size == 1 or x in drafts]
        for name in sizes.keys() - set(singles):
            part = torch.arange(self.seen[name], self.seen[name] + sizes[name])
            out = self.slabs.chunk(layer, name, self.given(name, layer, part), self.scoring)
            self.outs[name][layer].append(out.float().cpu())
        if not singles:
            return
        parts = [self.indices(x, sizes[x], *drafts.get(x, (0, 0))) for x in singles]
        each = [self.given(x, layer, part) for x, part in zip(singles, parts, strict=True)]
        joined = NewTokens(*(torch.cat([getattr(x, y) for x in each]) for y in FIELDS))
        counts = [len(x) for x in parts]
        out = self.slabs.decode(layer, singles, counts, joined, self.scoring)
        outs = out.float().cpu().split(counts)
        for name, out in zip(singles, outs, strict=True):
            right = drafts.get(name, (0, 0))[1]
            self.outs[name][layer].append(out[: sizes[name] + right])

    def indices(self, name: str, size: int, tokens: int, right: int) -> Tensor:
        """Which of a request's tokens come: next ones and, drafted wrongly, some from the end of its text."""
        assert size == 1 or not tokens
        start, end = self.seen[name], self.seen[name] + size + right
        wrong = range(len(self.tokens[name][0].q))[-1 : -1 - tokens + right : -1]
        return torch.tensor([*range(start, end), *wrong])

    def given(self, name: str, layer: int, index: Tensor) -> NewTokens:
        some = self.tokens[name][layer][index]
        rows = [x.to(self.device, self.dtype) for x in (some.q, some.k, some.v)]
        return NewTokens(*rows, some.evict.to(self.device))

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
                scores = new.q[:T, h] @ new.k[:T, kv].T * self.scoring.scale
                gone = (age < 0) | ((age > self.rules.window) & evict[None, :, kv])
                wanted = scores.masked_fill(gone, float("-inf")).softmax(-1) @ new.v[:T, kv]
                worst = max(worst, (out[:, h] - wanted).abs().max().item())
        return worst

    def positions(self, name: str) -> list[list[int]]:
        """Of the tokens that each list holds."""
        slabs, row = self.slabs, self.slabs.held[name].row
        found = []
        for layer in range(LAYERS):
            for head in range(HEADS):
                slots = torch.arange(int(slabs.tables.live[layer, row, head]), device=self.device)
                pages = slabs.tables.table[layer, row, head, slots // PAGE].long()
                found.append(slabs.positions[pages, slots % PAGE].sort().values.tolist())
        return found
