# SPDX-License-Identifier: Apache-2.0
"""Continuous batching, on a toy model that follows the graphs' contract."""

from functools import cache

import pytest
import torch
from toy_engine import ToyBackend, ToyGraphs, V, toy_manifest

from modelopt_dms.engine.bench import bench
from modelopt_dms.engine.errors import EngineError
from modelopt_dms.engine.manifest import Manifest
from modelopt_dms.engine.requests import Request
from modelopt_dms.engine.sampling import Sampler, Sampling, choose
from modelopt_dms.engine.session import Session
from modelopt_dms.engine.state import State
from modelopt_dms.ops.paged import OutOfPagesError

ENOUGH = 32


def session(batch: int, manifest: Manifest | None = None, pages: int = ENOUGH) -> Session:
    manifest = manifest or toy_manifest()
    return Session(manifest, ToyBackend(manifest, batch, pages))


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]


def alone(prompt: list[int], tokens: int, **changes: int) -> list[int]:
    """What a prompt gets token by token, with no session."""
    return _alone(tuple(prompt), tokens, tuple(changes.items()))


@cache
def _alone(prompt: tuple[int, ...], tokens: int, changes: tuple[tuple[str, int], ...]) -> list[int]:
    manifest = toy_manifest(**dict(changes))  # type: ignore[arg-type]
    graphs = ToyGraphs(manifest)
    state = State(manifest, 1, manifest.model.kv_heads * manifest.pages_per_list)
    ids = torch.arange(1, state.pages + 1, dtype=torch.int32)
    state.stacks["table"].copy_(ids.view(state.stacks["table"].shape[1:]))
    taken = list(prompt)
    for i in range(len(prompt) + tokens - 1):
        tensors = {
            x.name: state.tensor(x.name)
            for x in manifest.phases["decode"].inputs
            if state.has(x.name)
        }
        tensors["input_ids"], tensors["positions"] = torch.tensor([[taken[i]]]), torch.tensor([[i]])
        tensors["active"] = torch.tensor([True])
        given = graphs("decode", tensors)
        for port in manifest.phases["decode"].outputs:
            if port.name in given and port.state is not None:
                state.tensor(port.state).copy_(given[port.name])
        if i >= len(prompt) - 1:
            taken.append(int(given["logits"].argmax()))
    return taken[len(prompt) :]


@pytest.mark.parametrize("shift", [0, 1])
def test_batched_requests_get_what_each_gets_alone(shift: int) -> None:
    manifest = toy_manifest(shift=shift)
    given = prompts(1, 8, 9, 18, 3)
    expected = [alone(x, 8, shift=shift) for x in given]
    assert len({tuple(x) for x in expected}) == len(given)
    for batch in (1, 4):
        assert session(batch, manifest).generate(given, 8) == expected


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_of_any_size_read_the_same_prompt(chunk: int) -> None:
    manifest = toy_manifest(chunk=chunk)
    for prompt in prompts(1, 12, 34):
        running = session(2, manifest)
        assert running.generate([prompt], 6) == [alone(prompt, 6)]
        assert running.stats.chunks == -(-len(prompt) // chunk)
        assert running.stats.prompt_tokens == len(prompt)


def test_graphs_that_change_nothing_in_place_work_too() -> None:
    manifest = toy_manifest(in_place=False)
    given = prompts(5, 20, 11)
    assert session(2, manifest).generate(given, 8) == [alone(x, 8) for x in given]


def test_the_token_that_ends_a_sequence_is_the_last() -> None:
    prompt = prompts(9)[0]
    free = alone(prompt, 24)
    end = next(x for x in free[3:] if x not in free[:3])
    manifest = toy_manifest(eos=(end,))
    running = session(2, manifest)
    request = running.submit(prompt, 24)
    other = running.submit(prompt, 24, ignore_eos=True)
    running.run()
    assert request.tokens == free[: free.index(end) + 1]
    assert request.finish == "eos"
    assert (other.tokens, other.finish) == (free, "length")


def test_finished_requests_give_back_their_pages_and_their_slot() -> None:
    running = session(2)
    backend = running.backend
    given = prompts(66, 3, 9)
    assert running.generate(given, 4) == [alone(x, 4) for x in given]
    running.tables.check_integrity()
    assert running.tables.in_use == 0
    assert running.stats.peak_pages > 0
    fresh = State(running.manifest, 2, ENOUGH)
    for kind in ("table", "live", "seen", "ring_slot", "ring_evict"):
        assert torch.equal(backend.state.stacks[kind], fresh.stacks[kind]), kind
    again = running.generate(given[1:], 4)
    assert again == [alone(x, 4) for x in given[1:]]


def test_pages_are_used_again_when_there_are_few() -> None:
    # Two lists a layer: 4 pages are two of each, and four requests pass through them.
    given = prompts(12, 20, 9, 15)
    running = session(2, pages=4)
    assert running.generate(given, 8) == [alone(x, 8) for x in given]
    assert running.stats.peak_pages == 8
    assert running.stats.put_back == 0


def test_the_youngest_request_gives_way_and_starts_over() -> None:
    given = prompts(62, 63)
    expected = [alone(x, 5, window=150) for x in given]  # nothing expires
    running = session(2, toy_manifest(window=150), pages=5)
    assert running.generate(given, 5) == expected
    assert running.stats.put_back > 0
    running.tables.check_integrity()
    assert running.tables.in_use == 0


def test_a_request_that_needs_more_pages_than_there_are_fails_and_others_go_on() -> None:
    manifest = toy_manifest(window=150)  # nothing expires
    running = session(2, manifest, pages=3)
    long = running.submit(prompts(60)[0], 20)
    with pytest.raises(OutOfPagesError, match=r"3 pages of 64 slots .* 2 in use, .*--pages"):
        running.run()
    assert long.finish == "error"
    with pytest.raises(OutOfPagesError):
        list(running.stream(long))
    short = prompts(7)[0]
    assert running.generate([short], 5) == [alone(short, 5, window=150)]


def test_lengths_are_read_back_seldom_while_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    original = State.read_live

    def counted(self: State) -> object:
        nonlocal read
        read += 1
        return original(self)

    running = session(2)
    for prompt in prompts(8, 8):
        running.submit(prompt, 150)
    running.step()
    monkeypatch.setattr(State, "read_live", counted)
    for _ in range(128):
        running.step()
    assert 1 <= read <= 2


def test_tokens_stream_as_they_are_chosen() -> None:
    seen: list[tuple[int, int]] = []
    running = session(2)
    given = prompts(4, 30, 11)
    requests: list[Request] = []

    def note(request: Request, token: int) -> None:
        seen.append((requests.index(request), token))

    requests += [running.submit(x, 6, on_token=note) for x in given]
    first = []
    for token in running.stream(requests[0]):
        first.append(token)
        assert requests[0].tokens == first  # it came at once, not after the last one
    running.run()
    assert first == requests[0].tokens
    for i, request in enumerate(requests):
        assert [token for j, token in seen if j == i] == request.tokens
    assert [j for j, _ in seen[:3]] == [0, 0, 0]  # the second one is still reading its prompt
    assert list(running.stream(requests[2])) == requests[2].tokens


def test_a_callback_that_fails_leaves_the_session_whole() -> None:
    def fail(request: Request, token: int) -> None:
        if len(request.tokens) == 3:
            raise RuntimeError("the reader went away")

    running = session(1)
    running.submit(prompts(4)[0], 3, on_token=fail)
    with pytest.raises(RuntimeError, match="went away"):
        running.run()
    assert running.tables.in_use == 0
    assert running.generate(prompts(5), 3) == [alone(prompts(5)[0], 3)]


def test_a_callback_that_fails_costs_other_requests_nothing() -> None:
    def fail(request: Request, token: int) -> None:
        raise RuntimeError(
            f"reader {requests.index(request)} went away after {len(request.tokens)}"
        )

    given = prompts(4, 6, 5)
    heard: list[int] = []
    running = session(3)
    requests: list[Request] = []
    calls = [fail, fail, lambda request, token: heard.append(token)]
    requests += [running.submit(x, 6, on_token=y) for x, y in zip(given, calls, strict=True)]
    said = []
    for _ in range(6):
        with pytest.raises(RuntimeError) as raised:
            running.step()
        said.append(str(raised.value))
    # The first one of each step; no token is lost, given twice, or not told.
    assert said == [f"reader 0 went away after {n}" for n in range(1, 7)]
    assert [x.tokens for x in requests] == [alone(x, 6) for x in given]
    assert [x.finish for x in requests] == ["length"] * 3
    assert heard == requests[2].tokens
    assert not running.step()
    assert running.tables.in_use == 0


def test_a_seed_draws_the_same_tokens_whatever_else_is_generated() -> None:
    prompt = prompts(9)[0]
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=7)
    expected = session(1).generate([prompt], 12, sampling)[0]
    running = session(3)
    requests = [
        running.submit(x, 12, y)
        for x, y in zip(
            [*prompts(5, 40, seed=1), prompt],
            [Sampling(temperature=0.7, seed=1), None, sampling],
            strict=True,
        )
    ]
    running.run()
    assert requests[2].tokens == expected
    other = session(1).generate([prompt], 12, Sampling(temperature=1.5, top_p=0.9, seed=8))[0]
    assert other != expected
    assert session(1).generate([prompt], 12)[0] not in (expected, other)


def test_tokens_are_drawn_as_often_as_they_are_probable_and_never_beyond_top_p() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.25, 0.15])
    logits = (probabilities.log() * 2.0)[None]  # temperature 2 undoes it
    n = 1500
    sampler = Sampler(Sampling(temperature=2.0, top_p=0.75, seed=3))
    counts = torch.zeros(4)
    for _ in range(n):
        counts[choose(logits, [sampler])[0]] += 1
    assert counts[0] == counts[3] == 0
    assert abs(float(counts[1]) / n - 2 / 3) < 0.04
    every = [Sampler(Sampling(temperature=2.0, seed=i)) for i in range(n)]
    drawn = torch.bincount(torch.tensor(choose(logits.expand(n, -1), every)), minlength=4) / n
    assert torch.allclose(drawn, probabilities, atol=0.04)


def test_the_most_probable_token_is_kept_however_small_top_p_is() -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(Sampling(temperature=3.0, top_p=1e-9, seed=i)) for i in range(5)]
    assert choose(logits, samplers) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be more than 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be more than 0 and at most 1"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(sampling: dict[str, float], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Sampling(**sampling)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ([], 4, "the prompt is empty"),
        ([1.0, 2.0], 4, r"must be a list of integers, got float64 \[2\]"),
        (torch.zeros(3), 4, r"must be a list of integers, got float32 \[3\]"),
        ([[1, 2], [3]], 4, r"must be a list of integers, got lists of several lengths"),
        ([[1, 2]], 4, r"must be a list of integers, got int64 \[1, 2\]"),
        ([1, V], 4, f"must be 0 .. {V - 1}, got {V}"),
        ([-1, 2], 4, f"must be 0 .. {V - 1}, got -1"),
        ([1], 0, "max_new_tokens=0 must be 1 or more"),
        (
            [1] * 250,
            7,
            "too long a prompt for the profile: 250 tokens and 7 new ones, .* exported for 256",
        ),
    ],
)
def test_prompts_that_the_graphs_cannot_take_are_refused(
    prompt: list[int], tokens: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        session(1).submit(prompt, tokens)


def test_no_prompt_is_queued_if_one_cannot_be_taken() -> None:
    running = session(1)
    with pytest.raises(EngineError, match="empty"):
        running.generate([[1, 2], []], 3)
    assert not running.step()


def test_prompts_that_could_not_all_be_run_leave_nothing_behind() -> None:
    changes = {"window": 150}  # nothing expires
    running = session(2, toy_manifest(**changes), pages=3)  # type: ignore[arg-type]
    given = prompts(8, 60, 30, 9)
    other = running.submit(given[0], 40)
    with pytest.raises(OutOfPagesError):
        running.generate([given[1], given[2], given[2]], 20)
    assert (other.tokens, other.finish) == (alone(given[0], 40, **changes), "length")
    assert not running.step()
    running.tables.check_integrity()
    assert running.tables.in_use == 0
    assert running.generate([given[3]], 5) == [alone(given[3], 5, **changes)]


def test_a_prompt_may_fill_the_lists_to_the_last_slot() -> None:
    changes = {"window": 300, "pages_per_list": 1}
    prompt = prompts(58)[0]
    expected = [alone(prompt, 6, **changes)]
    assert session(1, toy_manifest(**changes)).generate([prompt], 6) == expected  # type: ignore[arg-type]


def test_a_benchmark_counts_what_was_run() -> None:
    running = session(2)
    times = bench(running, prompt_length=20, new_tokens=12)
    assert (times.batch, times.logical_tokens) == (2, 31)
    assert 0 < times.live_tokens < 31
    assert running.stats.decode_steps == 11
    assert times.decode_ms > 0
    assert times.tokens_per_second > 0
    assert times.peak_pages == 8
    assert times.peak_bytes == 8 * 64 * 14 * 4
