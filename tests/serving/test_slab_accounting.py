# SPDX-License-Identifier: Apache-2.0
"""Blocks of the vLLM plug-in: a scheduler and ranks in plain Python, driven at random.

The scheduler is as vLLM's: first come, first served; prompts in chunks; a request without blocks preempts the newest,
which starts over; reports come up to two steps late. Lists grow by random numbers: the ledger must hold for all gates.
Answers may come with drafts, of which any number of tokens is rejected.
"""

import copy
import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from modelopt_dms.serving.vllm.accounting import Ledger, Usage, least_blocks

PAGE, WINDOW, PROTECTED = 8, 5, 2
LEAST = least_blocks(WINDOW, PROTECTED, PAGE)
BUDGET = 24  # tokens of a step
RANKS = {"0": 6, "1": 4}  # lists of each


@dataclass
class Request:
    name: str
    prompt: int
    total: int
    keeps: float  # chance that a list keeps a token
    alike: bool = False  # all lists keep the same tokens: whole chunks of a prompt, or single ones
    computed: int = 0
    in_flight: int = 0
    lists: dict[str, list[int]] = field(default_factory=dict)
    forced: int = 0
    # After each token of a draft; the first entry is before it.
    drafted: list[dict[str, list[int]]] = field(default_factory=list)


class Serving:
    """A pool of blocks, a queue, and ranks."""

    def __init__(
        self, blocks: int, limit: int | None, lag: int, seed: int, drafts: int = 0
    ) -> None:
        self.free, self.blocks, self.lag, self.drafts = blocks, blocks, lag, drafts
        self.ledger = Ledger(PAGE, min(blocks, limit or blocks), LEAST)
        self.random = random.Random(seed)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.reports: deque[list[tuple[Request, int, int, dict[str, Usage], int]]] = deque()
        self.finished: list[Request] = []
        self.steps = self.preempted = 0

    def step(self) -> None:
        self.steps += 1
        budget, scheduled = BUDGET, []
        for request in list(self.running):
            tokens = self._tokens(request, budget)
            if request not in self.running or not tokens:
                continue
            while self.ledger.missing(request.name, request.computed + tokens) > self.free:
                victim = self.running[-1]
                self._stop(victim)
                self.waiting.appendleft(victim)
                self.preempted += 1
                scheduled = [x for x in scheduled if x[0] is not victim]
                if victim is request:
                    break
            else:
                self._give(request, tokens)
                scheduled.append((request, tokens))
                budget -= tokens
        while self.waiting and budget:
            request = self.waiting[0]
            tokens = self._tokens(request, budget)
            if self.ledger.missing(request.name, tokens) > self.free:
                break
            self.running.append(self.waiting.popleft())
            self._give(request, tokens)
            scheduled.append((request, tokens))
            budget -= tokens
        for request, tokens in scheduled:
            self._compute(request, tokens)
        self.reports.append([self._report(x) for x, _ in scheduled])
        while len(self.reports) > self.lag or (self.reports and not scheduled):
            self._deliver()

    def abort(self, index: int) -> None:
        everyone = [*self.running, *self.waiting]
        if everyone:
            request = everyone[index % len(everyone)]
            if request in self.running:
                self._stop(request)
            else:
                self.waiting.remove(request)

    def _tokens(self, request: Request, budget: int) -> int:
        # The next token of an answer is known when the last step has been reported.
        if request.computed >= request.prompt and request.in_flight:
            return 0
        if request.computed < request.prompt:
            return min(request.prompt - request.computed, budget)
        left = request.total - request.computed
        return min(1 + self.random.randint(0, self.drafts), left, budget)

    def _give(self, request: Request, tokens: int) -> None:
        more = self.ledger.grow(request.name, request.computed + tokens)
        self.free -= more
        assert self.free >= 0, "more blocks were handed out than there are"
        request.computed += tokens
        request.in_flight += 1

    def _compute(self, request: Request, tokens: int) -> None:
        held, capped = self.ledger[request.name].held, self.ledger.is_capped(request.name)
        before = request.computed - tokens
        drafts = tokens - 1 if before >= request.prompt else 0
        for rank, lists in RANKS.items():
            live = request.lists.setdefault(rank, [0] * lists)
            if drafts:
                self._cut(request, live, held, capped, growth=tokens)
        self._append(request, tokens - drafts)
        if not drafts:
            for live in request.lists.values():
                self._cut(request, live, held, capped, growth=0)
        request.drafted = [copy.deepcopy(request.lists)]
        for _ in range(drafts):
            self._append(request, 1)
            request.drafted.append(copy.deepcopy(request.lists))
        for live in request.lists.values():
            assert sum(-(-x // PAGE) for x in live) <= held * len(live), "a slab was too small"

    def _append(self, request: Request, tokens: int) -> None:
        same = tokens * (self.random.random() < request.keeps)
        for live in request.lists.values():
            for i in range(len(live)):
                each = sum(self.random.random() < request.keeps for _ in range(tokens))
                live[i] += same if request.alike else each

    def _cut(self, request: Request, live: list[int], held: int, capped: bool, growth: int) -> None:
        """Let the longest lists be as short as they must be to grow by so much."""
        if growth and not capped:
            return  # the ledger says that it fits: whether it does is looked at afterwards
        pages = [-(-(x + growth) // PAGE) for x in live]
        while sum(pages) > held * len(live):
            assert capped, "a slab was too small for lists that were not to be cut"
            i = max(range(len(live)), key=lambda i: live[i])
            target = PAGE * (pages[i] - 1) - growth
            assert target >= WINDOW + 1 + PROTECTED, "lists were to be cut below what must stay"
            request.forced += live[i] - target
            live[i], pages[i] = target, pages[i] - 1

    def _report(self, request: Request) -> tuple[Request, int, int, dict[str, Usage], int]:
        drafts = len(request.drafted) - 1
        before = request.drafted[0]
        usage = {rank: Usage.of(x, PAGE, request.forced) for rank, x in before.items()}
        epoch = self.ledger[request.name].epoch
        return request, epoch, request.computed - drafts, usage, self.random.randint(0, drafts)

    def _deliver(self) -> None:
        for request, epoch, tokens, usage, accepted in self.reports.popleft():
            surplus = self.ledger.settle(request.name, epoch, tokens, usage)
            if request.name not in self.ledger or self.ledger[request.name].epoch != epoch:
                assert surplus == 0, "a report about an earlier life was heard"
                continue
            self.free += surplus
            held = self.ledger[request.name].held
            for live in request.lists.values():
                assert sum(-(-x // PAGE) for x in live) <= held * len(live), "drafts lost pages"
            request.in_flight -= 1
            if not request.in_flight and len(request.drafted) > 1:
                request.lists = copy.deepcopy(request.drafted[accepted])
                request.computed = tokens + accepted
            if request.computed >= request.total and not request.in_flight:
                self._stop(request)
                self.finished.append(request)

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        self.free += self.ledger.close(request.name)
        request.computed = request.in_flight = 0
        request.lists, request.drafted = {}, []

    def check(self) -> None:
        held = sum(self.ledger[x.name].held for x in self.running)
        assert held + self.free == self.blocks, "blocks were lost"
        assert not any(x.name in self.ledger for x in self.waiting)

    def run_to_the_end(self, bound: int) -> None:
        until = self.steps + bound
        while self.running or self.waiting:
            self.step()
            self.check()
            assert self.steps <= until, f"no end after {bound} steps, {self.preempted} preemptions"
        while self.reports:
            self._deliver()
        assert self.free == self.blocks, "blocks were not given back"


class ServingMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(LEAST, 30),
        limit=st.none() | st.integers(LEAST, 12),
        lag=st.integers(0, 2),
        seed=st.integers(0, 1000),
        drafts=st.sampled_from([0, 3, PAGE - 1]),
    )
    def start(self, blocks: int, limit: int | None, lag: int, seed: int, drafts: int) -> None:
        self.serving = Serving(blocks, limit, lag, seed, drafts)
        self.tokens = self.requests = 0

    @rule(
        prompt=st.integers(1, 90),
        answer=st.integers(1, 60),
        keeps=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        alike=st.booleans(),
    )
    def arrive(self, prompt: int, answer: int, keeps: float, alike: bool) -> None:
        self.requests += 1
        self.tokens += prompt + answer
        request = Request(f"r{self.requests}", prompt, prompt + answer, keeps, alike)
        self.serving.waiting.append(request)

    @rule(steps=st.integers(1, 20))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.serving.step()
            self.serving.check()

    @rule(index=st.integers(0, 20))
    def leave(self, index: int) -> None:
        self.serving.abort(index)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "serving"):
            self.serving.check()

    def teardown(self) -> None:
        if hasattr(self, "serving"):
            # The oldest request moves on with every report, whatever the others do.
            self.serving.run_to_the_end(bound=(self.serving.lag + 2) * (self.tokens + 1))


# Not shrunk: that takes minutes, and what failed can be read as it is.
ServingMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
TestServing = ServingMachine.TestCase


@pytest.mark.parametrize("lag", [0, 2])
def test_a_request_that_evicts_nothing_finishes_in_a_pool_that_is_too_small_for_it(
    lag: int,
) -> None:
    serving = Serving(blocks=LEAST, limit=None, lag=lag, seed=0)
    serving.waiting.append(Request("greedy", 200, 300, keeps=1.0))
    serving.run_to_the_end(bound=1000)
    (request,) = serving.finished
    assert request.forced > 0 and serving.preempted == 0


def test_requests_worse_than_promised_all_finish() -> None:
    serving = Serving(blocks=2 * LEAST, limit=None, lag=1, seed=1)
    serving.waiting.extend(Request(f"r{i}", 60, 100, keeps=1.0) for i in range(5))
    serving.run_to_the_end(bound=5000)
    assert [x.name for x in serving.finished] == [f"r{i}" for i in range(5)]


def test_no_request_is_cut_where_blocks_suffice() -> None:
    serving = Serving(blocks=100, limit=None, lag=2, seed=2)
    serving.waiting.extend(Request(f"r{i}", 80, 120, keeps=0.5) for i in range(5))
    serving.run_to_the_end(bound=2000)
    assert sum(x.forced for x in serving.finished) == 0 and serving.preempted == 0


def test_a_slab_shrinks_to_what_its_lists_hold() -> None:
    ledger = Ledger(PAGE, limit=100, least=LEAST)
    assert ledger.grow("a", 80) == 10
    # Four lists of 8, 9, 0 and 30 tokens own 1 + 2 + 0 + 4 pages; a page more for those that are full.
    usage = Usage.of([8, 9, 0, 30], PAGE)
    assert (usage.pages, usage.blocks_after(0, PAGE), usage.blocks_after(1, PAGE)) == (7, 2, 3)
    assert ledger.settle("a", ledger["a"].epoch, 80, {"0": usage}) == 7
    assert ledger["a"].held == 3
    assert ledger.close("a") == 3 and ledger.close("a") == 0


def test_a_limit_below_what_is_always_resident_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{LEAST - 1} blocks of {PAGE} tokens, but {LEAST}"):
        Ledger(PAGE, limit=LEAST - 1, least=LEAST)
