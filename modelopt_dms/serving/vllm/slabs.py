# SPDX-License-Identifier: Apache-2.0
"""The KV rows of requests on one rank, in pages of their own slabs. Tensors only; knows no engine.

A slab is a list of blocks of a pool that somebody else hands out (`serving.vllm.accounting`). Block b holds the pages
b * lists .. (b + 1) * lists - 1 of the pool, one for each (layer, KV head) list of the rank, and any list of the
request may use any of them. Block 0 is never handed out: page 0 is where nobody looks (`kernels.layout.NO_PAGE`).

What lists do with their slots is what `kernels.append_reference` says: this is a reference, in plain PyTorch, that
synchronizes with the host. Shapes: L layers, S requests at a time, K KV heads, R = W + 1, P pages a list can own.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from modelopt_dms.kernels.append_reference import (
    plan_pack,
    spanned_pages,
    update_metadata,
    wanted_pages,
)
from modelopt_dms.kernels.decode_reference import decode_attention
from modelopt_dms.kernels.layout import (
    NO_PAGE,
    PAGE,
    OutOfPagesError,
    PagePool,
    PageTables,
    RowLayout,
)
from modelopt_dms.kernels.number_formats import RowFormat
from modelopt_dms.kernels.prefill_reference import Chunk, attend_chunk, expiry
from modelopt_dms.kernels.reference import Scoring, assign_slots, shift_decisions
from modelopt_dms.kernels.rollback import UndoLog, decide_previous, record
from modelopt_dms.kernels.rows import write_rows
from modelopt_dms.kvcache.forced_eviction import (
    LOOKAHEAD,
    cut,
    kept_anyway,
    lengths_that_fit,
    note_chunk,
)
from modelopt_dms.serving.vllm.accounting import Usage
from modelopt_dms.serving.vllm.drafts import Draft, Step, of_requests, reject, rounds


@dataclass(frozen=True)
class Rules:
    """What a model's gates were trained for.

    Attributes:
        window: W, tokens a marked token stays readable.
        shift: 1 if a token's decision governs the token before it, else 0.
        protect_first: tokens at the start that are never evicted.
    """

    window: int
    shift: int
    protect_first: int


@dataclass(frozen=True)
class SlabShape:
    """How many lists there can be.

    Attributes:
        layers: L, of the rank.
        heads: K, of the rank.
        requests: S.
    """

    layers: int
    heads: int
    requests: int


@dataclass(frozen=True)
class Grant:
    """The slab of a request, as the scheduler has it.

    Attributes:
        epoch: which life of the request.
        blocks: in order; a later grant of the same life is longer, or a part of it from the start.
        capped: whether lists must be cut where the slab does not do; else that is a fault.
    """

    epoch: int
    blocks: tuple[int, ...]
    capped: bool = False


@dataclass(frozen=True)
class NewTokens:
    """T tokens that come.

    Attributes:
        q: queries [T, H, Dk].
        k: keys [T, K, Dk].
        v: values [T, K, Dv].
        evict: decisions [T, K] bool, as made by these tokens' hidden states.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    evict: Tensor

    def __getitem__(self, index: slice | Tensor) -> "NewTokens":
        """Some of them."""
        return NewTokens(self.q[index], self.k[index], self.v[index], self.evict[index])

    @staticmethod
    def joined(parts: Sequence["NewTokens"]) -> "NewTokens":
        """All of them."""
        fields = ("q", "k", "v", "evict")
        return NewTokens(*(torch.cat([getattr(x, name) for x in parts]) for name in fields))


@dataclass
class Held:
    """A request with a slab.

    Attributes:
        row: of the tables.
        grant: its slab now.
        free: heap of indices of the slab's pages that no list owns; the first ones are taken first.
        forced: tokens evicted by force.
        draft: tokens that may be taken back.
    """

    row: int
    grant: Grant
    free: list[int] = field(default_factory=list)
    forced: int = 0
    draft: Draft = field(default_factory=Draft)


class Slabs:
    """The lists of all requests that run on a rank."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        shape: SlabShape,
        rules: Rules,
        form: RowFormat | None = None,
    ) -> None:
        """Start empty.

        Args:
            keys: the pool's pages [pages, PAGE, Dk], or their codes.
            values: likewise [pages, PAGE, Dv].
            shape: L, K and S.
            rules: of the model.
            form: number format of the rows, eight bits with one scale; None: they are stored as they come.
        """
        layers, heads, requests = shape.layers, shape.heads, shape.requests
        self.lists, self.rules, self.form = layers * heads, rules, form
        device, ring = keys.device, rules.window + 1

        def ints(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        dims = (requests, layers, heads)
        self.table = ints(NO_PAGE, *dims, 8)
        self.live = ints(0, *dims)
        self.seen = ints(0, *dims)
        self.ring_slot = ints(-1, *dims, ring)
        self.ring_evict = torch.zeros(*dims, ring, dtype=torch.bool, device=device)
        self.positions = ints(0, len(keys), PAGE)
        self._active = torch.ones(max(layers, requests), dtype=torch.bool, device=device)
        self._scales = torch.ones(4, heads, device=device)
        key_rows, value_rows = (RowLayout.of(form, x.shape[-1], x.dtype) for x in (keys, values))
        # Nobody takes pages from it: a request's pages are in its slab.
        free, counters = ints(0, 1), ints(0, 2)
        self.pool = PagePool(key_rows, value_rows, keys, values, None, None, free, counters)
        self.held: dict[str, Held] = {}
        self._rows = list(range(requests))[::-1]

    def update(
        self, grants: dict[str, Grant], gone: Iterable[str], steps: Mapping[str, Step]
    ) -> None:
        """Take in what the scheduler has handed out and taken away, before anything is written.

        Args:
            grants: by request.
            gone: requests that have lost their slabs.
            steps: what the requests get that take in tokens now.

        Raises:
            RuntimeError: the scheduler counts other tokens than the lists have seen.
        """
        for request in gone:
            self._drop(request)
        for request, step in steps.items():
            if request in self.held:
                self._take_back(self.held[request], step.computed)
        for request, grant in grants.items():
            held = self.held.get(request)
            if held is not None and held.grant.epoch != grant.epoch:
                self._drop(request)
                held = None
            if held is None:
                held = self.held[request] = Held(self._rows.pop(), Grant(grant.epoch, ()))
            before, after = len(held.grant.blocks), len(grant.blocks)
            if after < before:
                self._shrink(held, after)
            held.grant = grant
            for index in range(before * self.lists, after * self.lists):
                heapq.heappush(held.free, index)
        for request, step in steps.items():
            held = self.held[request]
            held.draft = Draft(step.drafts)
            if held.grant.capped and step.drafts:
                # No list may be cut between two layers' drafts: what it lost could not be taken back.
                self._make_room(held, None, 1 + step.drafts)

    def usage(self, request: str) -> tuple[int, int, Usage]:
        """Epoch, tokens taken in for good, and what the lists held then: a draft's tokens may go again."""
        held = self.held[request]
        seen, draft = int(self.seen[held.row, 0, 0]), held.draft
        live = draft.lengths_before(seen) if draft.tokens else self.live[held.row]
        usage = Usage.of(live.flatten().tolist(), PAGE, held.forced)
        return held.grant.epoch, seen - draft.tokens, usage

    def decode(
        self,
        layer: int,
        requests: Sequence[str],
        new: NewTokens,
        scoring: Scoring,
        log: UndoLog | None = None,
    ) -> Tensor:
        """Take in one token of each of n requests, and attend to what is resident: [n, H, Dv].

        Args:
            layer: which.
            requests: n names.
            new: their tokens.
            scoring: scale, softcap, sinks.
            log: where to keep what they overwrite, if they may be taken back.
        """
        new = self._rounded(new)
        held = [self.held[x] for x in requests]
        for x in held:
            if x.grant.capped and not x.draft.tokens:
                self._make_room(x, layer, 1)
        rows = torch.tensor([x.row for x in held], device=new.q.device)
        live = self.live[rows, layer]  # [n, K]
        seen = self.seen[rows, layer]
        evict = new.evict & (seen >= self.rules.protect_first + self.rules.shift)
        column = (seen[:, 0] % (self.rules.window + 1)).long()
        if self.rules.shift:
            before = ((seen[:, 0] - 1) % (self.rules.window + 1)).long()
            self.ring_evict[rows, layer, :, before] = evict
            evict = torch.zeros_like(evict)
        expired = self.ring_slot[rows, layer, :, column]  # [n, K]
        slot, longer = assign_slots(expired, self.ring_evict[rows, layer, :, column], live)
        self._take_pages(layer, held, (slot == live) & (slot % PAGE == 0), slot // PAGE)
        if log is not None:
            shorter = replace(self._tables(self.table[rows, layer], live), seen=seen)
            marked = self.ring_evict[rows, layer, :, column]
            record(log, self.pool, shorter, slot, expired, marked)
        self.live[rows, layer] = longer.to(torch.int32)
        self.ring_slot[rows, layer, :, column] = slot.to(torch.int32)
        self.ring_evict[rows, layer, :, column] = evict
        self.seen[rows, layer] = seen + 1
        lists = self._tables(self.table[rows, layer, :, : -(-int(longer.max()) // PAGE)], longer)
        write_rows(self.pool, lists, slot[..., None], new.k[:, :, None], new.v[:, :, None])
        where = lists.rows_of(slot[..., None])[..., 0]
        self.positions.view(-1)[where] = seen
        return decode_attention(new.q, self.pool, lists, scoring)

    def verify(
        self, layer: int, requests: Sequence[str], new: Sequence[NewTokens], scoring: Scoring
    ) -> list[Tensor]:
        """Take in one token or more of each of n requests, one after the other, so that drafts can be taken back.

        Args:
            layer: which.
            requests: n names.
            new: the tokens of each.
            scoring: scale, softcap, sinks.

        Returns:
            Of each [T, H, Dv].
        """
        order = sorted(range(len(new)), key=lambda i: -len(new[i].q))
        names, counts = [requests[i] for i in order], [len(new[i].q) for i in order]
        shape = self._tables(self.table[: len(new), layer], self.live[: len(new), layer])
        log = UndoLog.make(counts[0], self.pool, shape)
        outs: list[list[Tensor]] = [[] for _ in new]
        for j, n in enumerate(rounds(counts)):
            tokens = NewTokens.joined([new[i][j : j + 1] for i in order[:n]])
            part = of_requests(log, slice(n))
            found = self.decode(layer, names[:n], tokens, scoring, part)
            for place, i in enumerate(order[:n]):
                outs[i].append(found[place : place + 1])
        for place, name in enumerate(names):
            draft = self.held[name].draft
            if draft.tokens:
                draft.logs[layer] = of_requests(log, slice(place, place + 1))
        return [torch.cat(x) for x in outs]

    def chunk(self, layer: int, request: str, new: NewTokens, scoring: Scoring) -> Tensor:
        """Attend from T tokens of a request to what is resident and to each other, then take them in: [T, H, Dv].

        Args:
            layer: which.
            request: its name.
            new: its tokens.
            scoring: scale, softcap, sinks.
        """
        held, new = self.held[request], self._rounded(new)
        # Whether a chunk fits is known when it has been read. A page's worth can always be made to fit.
        step = PAGE if held.grant.capped else len(new.q)
        starts = range(0, len(new.q), step)
        return torch.cat([self._chunk(layer, held, new[x : x + step], scoring) for x in starts])

    def check_integrity(self) -> None:
        """Raise AssertionError if a page has two owners, or an owner whose slab it is not in."""
        owned: set[int] = set()
        for name, held in self.held.items():
            pages = [x for x in self.table[held.row].flatten().tolist() if x != NO_PAGE]
            free = [self._page(held, index) for index in held.free]
            slab = {b * self.lists + i for b in held.grant.blocks for i in range(self.lists)}
            assert len(set(pages)) == len(pages), f"{name}: two lists share a page"
            assert sorted(pages + free) == sorted(slab), f"{name}: pages are lost, or not its own"
            assert not owned & slab, f"{name}: a block belongs to two requests"
            owned |= slab
        assert 0 not in {x // self.lists for x in owned}, "block 0 was handed out"

    def _chunk(self, layer: int, held: Held, new: NewTokens, scoring: Scoring) -> Tensor:
        T, row, device = len(new.q), held.row, new.q.device
        if held.grant.capped:
            self._make_room(held, layer, T)
        self._widen(int(self.live[row, layer].max()) + T)
        lists = self._lists(layer, row)
        seen = lists.seen.clone()
        at = seen[..., None] + torch.arange(T, device=device)  # [1, K, T]
        decisions = new.evict.T[None] & (at >= self.rules.protect_first + self.rules.shift)
        decide_previous(lists, decisions[..., 0])
        resident = -(-int(lists.live.max()) // PAGE)
        old = replace(lists, table=lists.table[..., :resident])
        q, k, v = (x.transpose(0, 1)[None] for x in (new.q, new.k, new.v))  # [1, H or K, T, D]
        chunk = Chunk(
            q,
            k,
            v,
            shift_decisions(decisions, self.rules.shift),
            seen[:, 0].contiguous(),
            expiry=expiry(old, resident * PAGE),
        )
        out = attend_chunk(chunk, self.pool, old, scoring)
        plan = plan_pack(decisions, None, lists, shrinks=False)
        wanted = wanted_pages(lists, plan.live)[0]  # [K, P]
        for h, p in torch.nonzero(wanted).tolist():
            lists.table[0, h, p] = self._page(held, self._take(held))
        write_rows(self.pool, lists, plan.slots, k, v)
        note_chunk(self.positions, lists, plan, seen)
        update_metadata(plan, lists)
        return out[0].transpose(0, 1)

    def _rounded(self, new: NewTokens) -> NewTokens:
        """Tokens as they will be read: what is attended to must not depend on how a prompt is cut into chunks."""
        if self.form is None:
            return new
        k, v = (self.form.decode(self.form.encode(x), x.shape[-1], x.dtype) for x in (new.k, new.v))
        return replace(new, k=k, v=v)

    def _take_back(self, held: Held, computed: int) -> None:
        """Give up what was rejected of a draft, so that `computed` tokens are left."""
        rejected = int(self.seen[held.row, 0, 0]) - computed
        if not 0 <= rejected <= held.draft.tokens:
            raise RuntimeError(
                f"the scheduler counts {computed} tokens of a request whose lists have seen {computed + rejected}, "
                f"{held.draft.tokens} of them a draft; please report this"
            )
        if rejected:
            for layer, log in held.draft.logs.items():
                lists = self._lists(layer, held.row)
                reject(log, self.pool, lists, self.positions, rejected)
                surplus = ~spanned_pages(lists, lists.live) & (lists.table != NO_PAGE)
                self._give_back(held, lists.table[surplus].tolist())
                lists.table.masked_fill_(surplus, NO_PAGE)
        held.draft = Draft()

    def _give_back(self, held: Held, pages: Iterable[int]) -> None:
        """Let the request's other lists have these pages."""
        block_at = {block: index for index, block in enumerate(held.grant.blocks)}
        for page in pages:
            block, i = divmod(page, self.lists)
            heapq.heappush(held.free, block_at[block] * self.lists + i)

    def _make_room(self, held: Held, layer: int | None, tokens: int) -> None:
        """Cut the longest lists of a capped request until a layer, or all, can take in at most PAGE tokens."""
        live = self.live[held.row] if layer is None else self.live[held.row, layer]
        pages = ((live + tokens + PAGE - 1) // PAGE - (live + PAGE - 1) // PAGE).sum()
        if int(pages) <= len(held.free):
            return
        lists = self._lists(None, held.row)
        growth = torch.zeros_like(lists.live)
        if layer is None or tokens == 1:
            growth.fill_(max(LOOKAHEAD, tokens))
        else:
            growth[layer] = tokens
        least = kept_anyway(lists, self.rules.protect_first)
        live_of, growth_of, least_of = (x.flatten().tolist() for x in (lists.live, growth, least))
        pages_of = len(held.grant.blocks) * self.lists
        found = lengths_that_fit(live_of, growth_of, least_of, pages_of)
        if found is None:
            raise OutOfPagesError(
                f"a request holds {len(held.grant.blocks)} blocks, which do not hold what is always resident; give "
                "the KV cache more memory, or raise max_request_blocks"
            )
        target = torch.tensor(found, dtype=torch.int32, device=live.device).view_as(lists.live)
        held.forced += int((lists.live - target).clamp(min=0).sum())
        # A pool that only gathers what is given back.
        ids = torch.zeros(lists.table.numel() + 1, dtype=torch.int32, device=live.device)
        pool = replace(self.pool, free=ids, counters=torch.zeros_like(self.pool.counters))
        cut(lists, pool, self.positions, self.rules.protect_first, target)
        self._give_back(held, ids[: int(pool.counters[0])].tolist())

    def _take_pages(self, layer: int, held: Sequence[Held], wanted: Tensor, at: Tensor) -> None:
        """Give a page at place `at` [n, K] of their tables to those lists of n requests that want one [n, K]."""
        if not bool(wanted.any()):
            return
        self._widen((int(at.max()) + 1) * PAGE)
        for i, h in torch.nonzero(wanted).tolist():
            page = self._page(held[i], self._take(held[i]))
            self.table[held[i].row, layer, h, int(at[i, h])] = page

    def _take(self, held: Held) -> int:
        if not held.free:
            raise OutOfPagesError(
                f"the {len(held.grant.blocks)} blocks of a request are used up, and it was not to be cut: the "
                "scheduler reserved too few; please report this"
            )
        return heapq.heappop(held.free)

    def _page(self, held: Held, index: int) -> int:
        """The pool's page behind a slab's page."""
        return held.grant.blocks[index // self.lists] * self.lists + index % self.lists

    def _shrink(self, held: Held, blocks: int) -> None:
        """Move what lies in the last blocks of a slab into the first ones."""
        kept = blocks * self.lists
        free = sorted(x for x in held.free if x < kept)
        table = self.table[held.row]  # [L, K, P]
        leaving = torch.tensor(held.grant.blocks[blocks:], device=table.device)
        for at in torch.nonzero(torch.isin(table // self.lists, leaving)).tolist():
            page, target = int(table[tuple(at)]), self._page(held, free.pop(0))
            for x in (self.pool.keys, self.pool.values, self.positions):
                x[target] = x[page]
            table[tuple(at)] = target
        held.free = free  # sorted, so a heap

    def _drop(self, request: str) -> None:
        held = self.held.pop(request, None)
        if held is None:
            return
        for x, nothing in (
            (self.table, NO_PAGE),
            (self.live, 0),
            (self.seen, 0),
            (self.ring_slot, -1),
            (self.ring_evict, False),
        ):
            x[held.row] = nothing
        self._rows.append(held.row)

    def _widen(self, tokens: int) -> None:
        """Let lists own enough pages for so many tokens."""
        missing = -(-tokens // PAGE) - self.table.shape[-1]
        if missing > 0:
            more = max(missing, self.table.shape[-1])
            self.table = torch.nn.functional.pad(self.table, (0, more), value=NO_PAGE)

    def _lists(self, layer: int | None, row: int) -> PageTables:
        """The lists of a request in one layer [1, K], or in all [L, K]; changing them changes the tables."""
        at = row if layer is None else (slice(row, row + 1), layer)
        return replace(
            self._tables(self.table[at], self.live[at]),
            seen=self.seen[at],
            ring_slot=self.ring_slot[at],
            ring_evict=self.ring_evict[at],
        )

    def _tables(self, table: Tensor, live: Tensor) -> PageTables:
        """Lists [n, K] with these tables [n, K, P] and lengths [n, K]."""
        none = live[..., None]
        return PageTables(
            self.rules.window,
            self.rules.shift,
            table=table,
            live=live,
            seen=live,
            ring_slot=none,
            ring_evict=none,
            active=self._active[: len(live)],
            formats=(self.form, self.form),
            scales=self._scales,
        )
