# SPDX-License-Identifier: Apache-2.0
"""Many requests over a fixed number of batch slots: reads prompts by chunks, decodes all at once, shares the pages out.

Knows what graphs take and give, not what runs them. Lists grow by at most a token a step, so the host gives out pages
without asking the device, and reads the lengths back now and then.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence

from torch import Tensor

from modelopt_dms.engine.backend import Backend
from modelopt_dms.engine.feeds import decode_feeds, prefill_feeds
from modelopt_dms.engine.manifest import Manifest
from modelopt_dms.engine.pages import PageTables
from modelopt_dms.engine.requests import OnToken, Request, Slot, Stats, check_prompt
from modelopt_dms.engine.sampling import Sampling, choose
from modelopt_dms.ops.paged import OutOfPagesError

AHEAD = 16  # decode steps that pages are taken for at once: the table is copied that seldom
SETTLE_EVERY = 64  # decode steps between two readings of the lengths
KNOB = "give it more (--pages), or use fewer batch slots or shorter sequences"


class Session:
    """Continuous batching.

    Attributes:
        manifest: of the graphs.
        backend: that runs them.
        tables: who owns which page.
        stats: what was done.
    """

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        state, model = backend.state, manifest.model
        self.manifest = manifest
        self.backend = backend
        self.tables = PageTables(
            model.layers,
            state.batch,
            model.kv_heads,
            manifest.pages_per_list,
            state.pages,
            model.page_bytes,
            KNOB,
        )
        self.stats = Stats()
        self._waiting: deque[Request] = deque()
        self._slots: dict[int, Slot] = {}
        self._arrivals = 0
        self._hold = False  # after a request was put back, none comes in before another is done
        self._stale = False  # the device's tables are not those of the host
        self._unsettled = 0  # decode steps since the lengths were read
        self._failures: list[Exception] = []  # of callbacks, in this step

    def submit(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        on_token: OnToken | None = None,
        ignore_eos: bool = False,
    ) -> Request:
        """Queue a prompt.

        Args:
            prompt_ids: token ids.
            max_new_tokens: to generate at most.
            sampling: greedy if it is None.
            on_token: is called with the request and each token; what it raises comes out of `step` at its end.
            ignore_eos: go on to `max_new_tokens` whatever comes.

        Raises:
            EngineError: a prompt that the graphs cannot take.
        """
        ids = check_prompt(prompt_ids, max_new_tokens, self.manifest)
        request = Request(ids, max_new_tokens, sampling or Sampling(), on_token, ignore_eos)
        self._waiting.append(request)
        return request

    def step(self) -> bool:
        """Let requests in, read a chunk of every prompt that is not read yet, decode a token of all others.

        No request gets more than one token.

        Returns:
            Whether there is more to do.

        Raises:
            OutOfPagesError: one request alone needs more pages than there are; the session can go on without it.
            Exception: what a callback raised, the first if there are more; the step was done all the same.
        """
        try:
            self._advance()
        finally:
            failures, self._failures = self._failures, []
            if failures:
                raise failures[0]
        return bool(self._waiting or self._slots)

    def _advance(self) -> None:
        free = [x for x in range(self.backend.state.batch) if x not in self._slots]
        while self._waiting and free and not (self._hold and self._slots):
            request = self._waiting.popleft()
            ids = (*request.prompt, *request.tokens)
            self._arrivals += 1
            row = free.pop(0)
            self._slots[row] = Slot(row, request, ids, self._arrivals)
        decoding = [x.row for x in self._slots.values() if not x.reading]
        for slot in [x for x in self._slots.values() if x.reading]:
            self._read_chunk(slot)
        self._decode([x for x in decoding if x in self._slots])

    def run(self) -> None:
        """Go on until all requests are done."""
        while self.step():
            pass

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of a request as they come; other requests go on meanwhile."""
        given = 0
        while True:
            yield from request.tokens[given:]
            given = len(request.tokens)
            if request.error is not None:
                raise request.error
            if request.finish is not None:
                return
            # Tokens may have come while the last one was looked at.
            if given == len(request.tokens):
                self.step()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """New tokens for each prompt; see `submit` and `step` for what it raises, and then none is left queued."""
        for prompt in prompts:  # none is queued if one cannot be taken
            check_prompt(prompt, max_new_tokens, self.manifest)
        requests = [self.submit(x, max_new_tokens, sampling) for x in prompts]
        try:
            self.run()
        except BaseException:
            self._give_up(requests)
            raise
        return [x.tokens for x in requests]

    def _give_up(self, requests: list[Request]) -> None:
        """Forget requests that nobody will ask for."""
        self._waiting = deque(x for x in self._waiting if x not in requests)
        for slot in [x for x in self._slots.values() if x.request in requests]:
            self._leave(slot)

    def _read_chunk(self, slot: Slot) -> None:
        """Read the next chunk of a prompt; the last one gives the next token."""
        T = self.manifest.chunk
        start, end = slot.next_chunk(T)
        if slot.row not in self._slots or not self._make_room([slot.row], end - start):
            return
        began = time.perf_counter()
        logits = self._run("prefill", prefill_feeds(slot, start, end, T), slot.row)
        slot.chunks_read += 1
        slot.request.seen = end
        self.tables.advance([slot.row], end - start)
        self._settle([slot.row])
        self.stats.chunks += 1
        self.stats.prompt_tokens += end - start
        if end == len(slot.ids):
            slot.reading = False
            self._take([slot], choose(logits, [slot.request.sampler]))
        self.stats.prefill_seconds += time.perf_counter() - began

    def _decode(self, rows: list[int]) -> None:
        """The next token of all requests in these batch slots."""
        rows = self._make_room(rows, 1)
        if not rows:
            return
        began = time.perf_counter()
        slots = [self._slots[x] for x in rows]
        logits = self._run("decode", decode_feeds(slots, self.backend.state.batch))
        self.tables.advance(rows, 1)
        for slot in slots:
            slot.request.seen += 1
        self._unsettled += 1
        if self._unsettled >= SETTLE_EVERY:
            self._settle(list(self._slots))
        tokens = choose(logits[rows], [x.request.sampler for x in slots])
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(tokens)
        self.stats.decode_seconds += time.perf_counter() - began
        self._take(slots, tokens)

    def _run(self, phase: str, feeds: dict[str, Tensor], row: int | None = None) -> Tensor:
        if self._stale:
            self.backend.state.write_tables(self.tables.table)
            self._stale = False
        self.stats.peak_pages = max(self.stats.peak_pages, self.tables.in_use)
        return self.backend.run(phase, feeds, row)

    def _take(self, slots: list[Slot], tokens: list[int]) -> None:
        """Give requests their next tokens, and the batch slots of those that are done to others; then tell of it."""
        self.stats.new_tokens += len(tokens)
        for slot, token in zip(slots, tokens, strict=True):
            slot.request.take(token, self.manifest.model.eos)
        done = [x for x in slots if x.request.finish is not None]
        live = self.backend.state.read_live() if done else None
        for slot in done:
            assert live is not None
            slot.request.live = float(live[:, slot.row].mean())
            self._leave(slot)
            self._hold = False
        # Last: a callback may raise anything, and all requests have their token.
        for slot, token in zip(slots, tokens, strict=True):
            try:
                slot.request.tell(token)
            except Exception as error:
                self._failures.append(error)

    def _leave(self, slot: Slot) -> None:
        """Empty a batch slot."""
        del self._slots[slot.row]
        self.tables.release(slot.row)
        self.backend.state.reset([slot.row])  # its row of the device's tables, too

    def _settle(self, rows: list[int]) -> None:
        """Learn the lengths of the lists of these batch slots, and take back what they own beyond."""
        live = self.backend.state.read_live()
        self._stale |= self.tables.settle(rows, live[:, rows])
        if len(rows) == len(self._slots):
            self._unsettled = 0

    def _make_room(self, rows: list[int], tokens: int) -> list[int]:
        """Pages for so many tokens in these batch slots; the youngest requests give way to the others.

        Returns:
            The batch slots that are still there.
        """
        while rows and not self.tables.covers(rows, tokens):
            try:
                self._stale |= self.tables.reserve(rows, max(tokens, AHEAD))
            except OutOfPagesError:
                self._settle(list(self._slots))
                try:
                    self._stale |= self.tables.reserve(rows, tokens)
                except OutOfPagesError as error:
                    self._give_way(error)
                    rows = [x for x in rows if x in self._slots]
        return rows

    def _give_way(self, error: OutOfPagesError) -> None:
        """Put the youngest request back in the queue; it will start over with what it has.

        Raises:
            OutOfPagesError: there is one only.
        """
        youngest = max(self._slots.values(), key=lambda x: x.arrival)
        alone = len(self._slots) == 1
        self._leave(youngest)
        if alone:
            youngest.request.finish, youngest.request.error = "error", error
            raise error
        self._waiting.appendleft(youngest.request)
        self._hold = True
        self.stats.put_back += 1
