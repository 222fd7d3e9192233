# SPDX-License-Identifier: Apache-2.0
"""The KV rows of requests on one rank, in pages of their own slabs. Tensors only; knows no engine.

What lists do with their slots is what `kernels.append_reference` says, and `kernels.dispatch` picks who does it: plain
PyTorch on a CPU, Triton on a GPU. A step asks the device nothing within its layers, but for chunks of capped requests:
the host knows from the last report (`usage`) how long lists are, and what has come since.

Shapes: L layers, S requests at a time, K KV heads, R = W + 1, P pages a list can own; B rows of requests.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modelopt_dms.kernels import dispatch
from modelopt_dms.kernels.append_reference import plan_pack
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.kernels.layout import PAGE, OutOfPagesError, PagePool, RowLayout
from modelopt_dms.kernels.number_formats import RowFormat
from modelopt_dms.kernels.prefill_reference import Chunk, expiry
from modelopt_dms.kernels.reference import Scoring, shift_decisions
from modelopt_dms.kernels.rollback import decide_previous
from modelopt_dms.kvcache.forced_eviction import (
    LOOKAHEAD,
    cut,
    kept_anyway,
    lengths_that_fit,
    note_chunk,
    note_token,
)
from modelopt_dms.serving.vllm.accounting import Usage
from modelopt_dms.serving.vllm.drafts import DraftLogs, Round, Step, rounds
from modelopt_dms.serving.vllm.slab_pages import SlabPages
from modelopt_dms.serving.vllm.slab_tables import Rules, SlabShape, SlabTables, only_active


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


@dataclass
class Held:
    """A request with a slab.

    Attributes:
        row: of the tables.
        grant: its slab now.
        usage: what its lists held at the last report, a draft's tokens among them; they may hold less now.
        longest: of them, tokens.
        seen: tokens taken in, a draft's among them.
        forced: tokens evicted by force.
        draft: of the tokens, the last ones, how many may be taken back.
    """

    row: int
    grant: Grant
    usage: Usage
    longest: int = 0
    seen: int = 0
    forced: int = 0
    draft: int = 0


@dataclass(frozen=True)
class Singles:
    """The requests of a step that get a token, or one and a draft: the same in all layers.

    Attributes:
        requests: their names.
        counts: their tokens.
        rounds: of one token each.
        logged: whether tokens may be taken back.
        pages: places of the tables that lists can come to fill.
    """

    requests: Sequence[str]
    counts: Sequence[int]
    rounds: list[Round]
    logged: bool
    pages: int


class Slabs:
    """The lists of all requests that run on a rank.

    Attributes:
        held: requests with slabs, by name.
        tables: their lists.
        pages: their slabs.
        positions: of the tokens in all slots of the pool [pages, PAGE] int32, up to the last report.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        shape: SlabShape,
        rules: Rules,
        form: RowFormat | None = None,
        impl: str = "auto",
    ) -> None:
        """Start empty.

        Args:
            keys: the pool's pages [pages, PAGE, Dk], or their codes.
            values: likewise [pages, PAGE, Dv].
            shape: L, K and S.
            rules: of the model.
            form: number format of the rows, eight bits with one scale of 1; None: they are stored as they come.
            impl: who computes; see `kernels.dispatch`.

        Raises:
            ValueError: it cannot, on the device of the pages.
        """
        self.impl = dispatch.choose(impl, keys.device)
        self.rules, self.form = rules, form
        self.tables = SlabTables(shape, rules, form, keys.device)
        self.pages = SlabPages(shape.layers * shape.heads, shape.requests, keys.device)
        self.positions = torch.zeros(len(keys), PAGE, dtype=torch.int32, device=keys.device)
        key_rows, value_rows = (RowLayout.of(form, x.shape[-1], x.dtype) for x in (keys, values))
        free, counters = self.pages.free, self.pages.counters
        self._pool = PagePool(key_rows, value_rows, keys, values, None, None, free, counters)
        self._logs = DraftLogs(self.tables, self._pool, shape.drafts + 1)
        self.held: dict[str, Held] = {}
        self._rows = list(range(shape.requests))  # a heap: the first rows are taken first
        self._singles: Singles | None = None
        self._unnoted = 0  # of the newest tokens of all rows, those whose positions are not noted

    @property
    def lists(self) -> int:
        """L * K: pages of a block."""
        return self.pages.lists

    def update(
        self, grants: Mapping[str, Grant], gone: Iterable[str], steps: Mapping[str, Step]
    ) -> None:
        """Take in what the scheduler has handed out and taken away, before anything is written.

        Args:
            grants: by request.
            gone: requests that have lost their slabs.
            steps: what the requests get that take in tokens now.

        Raises:
            RuntimeError: the scheduler counts other tokens than the lists have seen.
        """
        self._note_tokens()
        self._singles = None
        for request in gone:
            self._drop(request)
        changed = self._take_back(steps)
        slabs: dict[int, Sequence[int]] = {}
        for request, grant in grants.items():
            held = self.held.get(request)
            if held is not None and held.grant.epoch != grant.epoch:
                self._drop(request)
                held = None
            if held is None:
                nothing = Usage.of([0] * self.lists, PAGE)
                row = heapq.heappop(self._rows)
                held = self.held[request] = Held(row, Grant(grant.epoch, ()), nothing)
            if grant.blocks != held.grant.blocks:
                self._shrink(held, len(grant.blocks))
                slabs[held.row] = grant.blocks
            held.grant = grant
        if slabs:
            self.pages.assign(slabs)
        self._restack({*changed, *slabs})
        for request, step in steps.items():
            held = self.held[request]
            held.draft = step.drafts
            if held.grant.capped:
                # No list may be cut between two layers' tokens: what it lost could not be taken back.
                self._make_room(held, None, 1 + step.drafts)

    def usage(self, requests: Sequence[str]) -> dict[str, tuple[int, int, Usage]]:
        """Of requests: epoch, tokens taken in for good, and what the lists held then: a draft's tokens may go again.

        Waits for the device, once.

        Raises:
            OutOfPagesError: a slab was too small, and rows are lost.
        """
        self._note_tokens()
        held = [self.held[x] for x in requests]
        rows = torch.tensor([x.row for x in held], device=self.positions.device)
        live = self.tables.live[:, rows]
        counted = [live.amax((0, 2))[:, None], self.pages.counters[rows, 1:], _counts(live)]
        drafted = [(i, x.row, x.seen - x.draft) for i, x in enumerate(held) if x.draft]
        if drafted:
            at, some, settled = torch.tensor(drafted, device=rows.device).unbind(1)
            before = self._logs.lengths_before(some, settled)
            counted.append(_counts(live.index_copy(1, at, before)))
        else:
            counted.append(counted[-1])
        found = {}
        for name, x, numbers in zip(requests, held, torch.cat(counted, 1).tolist(), strict=True):
            x.longest, fewest, *counts = numbers
            if fewest < 0:
                raise OutOfPagesError(
                    f"the {len(x.grant.blocks)} blocks of a request are used up, and it was not to be cut: the "
                    "scheduler reserved too few; please report this"
                )
            x.usage, report = (
                _usage(part, x.forced) for part in (counts[: PAGE + 1], counts[PAGE + 1 :])
            )
            found[name] = (x.grant.epoch, x.seen - x.draft, report)
        return found

    def decode(
        self,
        layer: int,
        requests: Sequence[str],
        counts: Sequence[int],
        new: NewTokens,
        scoring: Scoring,
    ) -> Tensor:
        """Take in one token or more of each of n requests, one after the other, and attend from each: [T, H, Dv].

        Args:
            layer: which; a step's first is 0.
            requests: n names, the same in all layers of a step.
            counts: of their tokens.
            new: their T tokens, request by request.
            scoring: scale, softcap, sinks.
        """
        new = self._rounded(new)
        singles = self._singles_of(requests, counts)
        if layer == 0:
            for name, count in zip(requests, counts, strict=True):
                self.held[name].seen += count
        out = None
        for part in singles.rounds:
            if part.at is None:
                return self._decode(layer, part, new, singles, scoring)
            found = self._decode(layer, part, new[part.at], singles, scoring)
            out = found.new_empty(len(new.q), *found.shape[1:]) if out is None else out
            out.index_copy_(0, part.at, found)
        assert out is not None
        return out

    def chunk(self, layer: int, request: str, new: NewTokens, scoring: Scoring) -> Tensor:
        """Attend from T tokens of a request to what is resident and to each other, then take them in: [T, H, Dv].

        Args:
            layer: which; a step's first is 0.
            request: its name.
            new: its tokens.
            scoring: scale, softcap, sinks.
        """
        held, new = self.held[request], self._rounded(new)
        if layer == 0:
            held.seen += len(new.q)
        # Whether a chunk fits is known when it has been read. A page's worth can always be made to fit.
        step = PAGE if held.grant.capped else len(new.q)
        starts = range(0, len(new.q), step)
        return torch.cat(
            [self._chunk(layer, held, new[x : x + step], held.longest + x, scoring) for x in starts]
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if a page has two owners, or an owner whose slab it is not in."""
        blocks: set[int] = set()
        for name, held in self.held.items():
            table = self.tables.table[:, held.row].flatten()
            owned = table[table > 0].tolist()
            count = int(self.pages.counters[held.row, 0])
            free = self.pages.free[held.row, :count].tolist()
            slab = {b * self.lists + i for b in held.grant.blocks for i in range(self.lists)}
            filled = -(-self.tables.live[:, held.row] // PAGE)
            assert len(set(owned)) == len(owned), f"{name}: two lists share a page"
            assert len(owned) == int(filled.sum()), (
                f"{name}: a list has a page too many, or too few"
            )
            assert sorted(owned + free) == sorted(slab), f"{name}: pages are lost, or not its own"
            assert not blocks & set(held.grant.blocks), f"{name}: a block belongs to two requests"
            blocks |= set(held.grant.blocks)
        assert 0 not in blocks, "block 0 was handed out"

    def _singles_of(self, requests: Sequence[str], counts: Sequence[int]) -> Singles:
        """What all layers need of these requests, made in the first one."""
        made = self._singles
        if made is not None and (made.requests, made.counts) == (requests, counts):
            return made
        held = [self.held[x] for x in requests]
        logged = any(x.draft for x in held)
        width = 1 + max(x.row for x in held)
        if logged:
            width = self._logs.reserve(width)
        longest = max(x.longest + count for x, count in zip(held, counts, strict=True))
        self.tables.widen(longest)
        # The reference reads as far as it is told to; kernels know where lists end.
        narrow = self.impl == "reference"
        pages = -(-longest // PAGE) if narrow else self.tables.table.shape[-1]
        parts = rounds([x.row for x in held], counts, width, self.positions)
        self._singles = Singles(requests, counts, parts, logged, pages)
        self._unnoted = max(counts)
        return self._singles

    def _decode(
        self, layer: int, part: Round, new: NewTokens, singles: Singles, scoring: Scoring
    ) -> Tensor:
        """One token of each of n requests: [n, H, Dv]."""
        lists = self.tables.of_rows(layer, part.active, singles.pages)
        pool = self.pages.of_rows(self._pool, len(part.active))
        q, k, v, evict = (part.spread(x) for x in (new.q, new.k, new.v, new.evict))
        gate = Decided(self._allowed(evict, lists.seen))
        log = self._logs.of_layer(layer) if singles.logged else None
        dispatch.append_token(k, v, gate, pool, lists, impl=self.impl, log=log)
        out = dispatch.decode_attention(q, pool, only_active(lists), scoring, impl=self.impl)
        return out[part.rows]

    def _chunk(
        self, layer: int, held: Held, new: NewTokens, longest: int, scoring: Scoring
    ) -> Tensor:
        """As `chunk`, where no list is longer than that."""
        T = len(new.q)
        if held.grant.capped:
            self._make_room(held, layer, T)
        self.tables.widen(longest + T)
        lists = self.tables.of_row(layer, held.row)
        seen = lists.seen.clone()
        at = seen[..., None] + torch.arange(T, device=seen.device)  # [1, K, T]
        decisions = self._allowed(new.evict.T[None], at)
        decide_previous(lists, decisions[..., 0])
        resident, old = -(-longest // PAGE), lists
        if self.impl == "reference":
            old = replace(lists, table=lists.table[..., :resident])
        q, k, v = (x.transpose(0, 1)[None] for x in (new.q, new.k, new.v))  # [1, H or K, T, D]
        chunk = Chunk(
            q,
            k,
            v,
            shift_decisions(decisions, self.rules.shift),
            seen[:, 0].contiguous(),
            expiry=expiry(old, resident * PAGE) if resident else None,
        )
        out = dispatch.attend_chunk(chunk, self._pool, old, scoring, impl=self.impl)
        plan = plan_pack(decisions, None, lists, shrinks=False)
        pool = self.pages.of_row(self._pool, held.row)
        dispatch.apply_plan(plan, k, v, pool, lists, impl=self.impl)
        note_chunk(self.positions, lists, plan, seen)
        return out[0].transpose(0, 1)

    def _allowed(self, evict: Tensor, at: Tensor) -> Tensor:
        """Decisions that tokens at these positions make, but none about the first tokens."""
        return evict & (at >= self.rules.protect_first + self.rules.shift)

    def _rounded(self, new: NewTokens) -> NewTokens:
        """Tokens as they will be read: what is attended to must not depend on how a prompt is cut into chunks."""
        if self.form is None:
            return new
        k, v = (self.form.decode(self.form.encode(x), x.shape[-1], x.dtype) for x in (new.k, new.v))
        return replace(new, k=k, v=v)

    def _note_tokens(self) -> None:
        """Note the positions of what single tokens were taken in since the last time, in all layers at once."""
        for back in reversed(range(self._unnoted)):
            note_token(self.positions, self.tables.of_all(), back)
        self._unnoted = 0

    def _take_back(self, steps: Mapping[str, Step]) -> list[int]:
        """Give up what was rejected of drafts, so that what was computed is left: rows that have changed."""
        rejected = [0] * self._logs.rows
        for request, step in steps.items():
            if request not in self.held:
                continue
            held = self.held[request]
            surplus = held.seen - step.computed
            if not 0 <= surplus <= held.draft:
                raise RuntimeError(
                    f"the scheduler counts {step.computed} tokens of a request whose lists have seen {held.seen}, "
                    f"{held.draft} of them a draft; please report this"
                )
            if surplus:
                rejected[held.row] = surplus
                held.seen = step.computed
            held.draft = 0
        if any(rejected):
            self._logs.reject(rejected, self.positions)
        return [row for row, tokens in enumerate(rejected) if tokens]

    def _make_room(self, held: Held, layer: int | None, tokens: int) -> None:
        """Cut the longest lists of a capped request until a layer, or all, can take in at most PAGE tokens."""
        pages_of = len(held.grant.blocks) * self.lists
        if layer is None and held.usage.pages_after(tokens, PAGE) <= pages_of:
            return
        row = slice(held.row, held.row + 1)
        lists = self.tables.copied(row)  # [L, K]
        live = lists.live if layer is None else lists.live[layer]
        pages = ((live + tokens + PAGE - 1) // PAGE - (live + PAGE - 1) // PAGE).sum()
        if int(pages - self.pages.counters[held.row, 0]) <= 0:
            return
        growth = torch.zeros_like(lists.live)
        if layer is None or tokens == 1:
            growth.fill_(max(LOOKAHEAD, tokens))
        else:
            growth[layer] = tokens
        least = kept_anyway(lists, self.rules.protect_first)
        live_of, growth_of, least_of = (x.flatten().tolist() for x in (lists.live, growth, least))
        found = lengths_that_fit(live_of, growth_of, least_of, pages_of)
        if found is None:
            raise OutOfPagesError(
                f"a request holds {len(held.grant.blocks)} blocks, which do not hold what is always resident; give "
                "the KV cache more memory, or raise max_request_blocks"
            )
        held.forced += sum(max(0, x - y) for x, y in zip(live_of, found, strict=True))
        target = torch.tensor(found, dtype=torch.int32, device=live.device).view_as(lists.live)
        # What is given back is found anew, so nobody needs to know here.
        ids = torch.zeros(lists.table.numel() + 1, dtype=torch.int32, device=live.device)
        pool = replace(self._pool, free=ids, counters=ids.new_zeros(2))
        cut(lists, pool, self.positions, self.rules.protect_first, target)
        self.tables.put_back(row, lists)
        self._restack({held.row})

    def _shrink(self, held: Held, blocks: int) -> None:
        """Move what lies in the last blocks of a slab into the first ones, if it loses some."""
        before = len(held.grant.blocks)
        if blocks < before:
            stores = (self._pool.keys, self._pool.values, self.positions)
            table = self.tables.table[:, held.row]
            self.pages.compact(held.row, before, blocks, table, stores)

    def _restack(self, rows: set[int]) -> None:
        if rows:
            self.pages.restack(sorted(rows), self.tables.table, len(self.positions))

    def _drop(self, request: str) -> None:
        held = self.held.pop(request, None)
        if held is None:
            return
        self.tables.forget(held.row)
        heapq.heappush(self._rows, held.row)


def _counts(live: Tensor) -> Tensor:
    """Of requests with lists [L, n, K]: how many have 0, 1, .. free slots in their last page; pages. [n, PAGE + 1]."""
    by_request = live.transpose(0, 1).flatten(1)  # [n, L * K]
    room = by_request.new_zeros(len(by_request), PAGE)
    room.scatter_add_(1, (-by_request % PAGE).long(), torch.ones_like(by_request))
    pages = (by_request + PAGE - 1) // PAGE
    return torch.cat([room, pages.sum(1, keepdim=True, dtype=room.dtype)], 1)


def _usage(counts: list[int], forced: int) -> Usage:
    """What one request's `_counts` mean."""
    room, pages = counts[:PAGE], counts[PAGE]
    found = tuple((free, lists) for free, lists in enumerate(room) if lists)
    return Usage(sum(room), pages, found, forced)
