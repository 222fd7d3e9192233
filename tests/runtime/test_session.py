# SPDX-License-Identifier: Apache-2.0
"""A static batch, on a toy model that follows the graphs' contract."""

from functools import cache

import pytest
import torch
from toy_engine import ToyBackend, ToyGraphs, V, toy_manifest

from modelopt_dms.kernels.layout import NO_PAGE, OutOfPagesError
from modelopt_dms.runtime.bench import bench
from modelopt_dms.runtime.manifest import EngineError, Manifest
from modelopt_dms.runtime.prompts import allocate_pages
from modelopt_dms.runtime.sampling import Sampler
from modelopt_dms.runtime.session import Session
from modelopt_dms.runtime.state import State

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
def test_prompts_of_a_batch_get_what_each_gets_alone(shift: int) -> None:
    manifest = toy_manifest(shift=shift)
    given = prompts(1, 8, 9, 18, 3)
    expected = [alone(x, 8, shift=shift) for x in given]
    assert len({tuple(x) for x in expected}) == len(given)
    for batch in (5, 7):
        assert session(batch, manifest, pages=10).generate(given, 8) == expected
    padded = torch.tensor([given[1], given[1]])
    assert session(2, manifest).generate(padded, 8) == [expected[1]] * 2


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_of_any_size_read_the_same_prompt(chunk: int) -> None:
    manifest = toy_manifest(chunk=chunk)
    for prompt in prompts(1, 12, 34):
        running = session(2, manifest)
        assert running.generate([prompt], 6) == [alone(prompt, 6)]
        calls = running.backend.calls  # type: ignore[attr-defined]
        assert calls.count(("prefill", 0)) == -(-len(prompt) // chunk)
        assert running.stats.prompt_tokens == len(prompt)


def test_graphs_that_change_nothing_in_place_work_too() -> None:
    manifest = toy_manifest(in_place=False)
    given = prompts(5, 20, 11)
    assert session(3, manifest).generate(given, 8) == [alone(x, 8) for x in given]


def test_the_token_that_ends_a_text_is_the_last() -> None:
    prompt, other = prompts(9, 12)
    free = alone(prompt, 24)
    end = next(x for x in free[3:] if x not in free[:3])
    running = session(2, toy_manifest(eos=(end,)))
    found = running.generate([prompt, other], 24)
    assert found[0] == free[: free.index(end) + 1]
    long = alone(other, 24)
    assert found[1] == (long[: long.index(end) + 1] if end in long else long)
    assert len(found[0]) != len(found[1])
    assert running.stats.seen == tuple(
        len(x) + len(y) - 1 for x, y in zip((prompt, other), found, strict=True)
    )


def test_a_batch_leaves_nothing_to_the_next_one() -> None:
    running = session(3)
    for given in (prompts(66, 3, 9), prompts(3, 9), prompts(9)):
        assert running.generate(given, 4) == [alone(x, 4) for x in given]
    # The last one has two lists in each of two layers.
    table = running.backend.state.stacks["table"]
    assert int((table != NO_PAGE).sum()) == running.stats.pages == 4
    assert running.stats.live[0] < running.stats.seen[0] == 12


def test_too_few_pages_are_one_error_before_anything_runs() -> None:
    running = session(2, pages=5)
    given = prompts(62, 60)
    with pytest.raises(
        OutOfPagesError,
        match=r"5 pages of 64 slots in each of 2 layers \(35840 bytes\), and 2 prompts with their new tokens need 6 "
        r"\(43008 bytes\); give it --pages 6, fewer prompts, or fewer new tokens",
    ):
        running.generate(given, 4)
    assert not running.backend.calls  # type: ignore[attr-defined]
    # The last new token needs no slot.
    assert running.generate(given, 3) == [alone(x, 3) for x in given]


def test_every_list_has_pages_of_its_own() -> None:
    table = allocate_pages([1, 65, 128], 4, 10, toy_manifest())
    assert table.shape == (4, 2, 4)
    assert table[table != NO_PAGE].tolist() == list(range(1, 11))
    assert (table != NO_PAGE).sum(-1).tolist() == [[1, 1], [2, 2], [2, 2], [0, 0]]
    with pytest.raises(OutOfPagesError, match="has 9 pages .* need 10"):
        allocate_pages([1, 65, 128], 4, 9, toy_manifest())


def test_tokens_stream_as_they_are_chosen() -> None:
    heard: list[tuple[int, int]] = []
    running = session(3)
    given = prompts(4, 30, 11)
    found = running.generate(given, 6, on_token=lambda *x: heard.append(x))
    assert [x for x, _ in heard] == [0, 1, 2] * 6
    for row, tokens in enumerate(found):
        assert [x for i, x in heard if i == row] == tokens
    calls = running.backend.calls  # type: ignore[attr-defined]
    assert [x for x, _ in calls[-5:]] == ["decode"] * 5


def test_a_callback_that_fails_stops_the_batch_and_the_next_one_is_right() -> None:
    def fail(row: int, token: int) -> None:
        raise RuntimeError(f"the reader of {row} went away")

    running = session(2)
    with pytest.raises(RuntimeError, match="reader of 0 went away"):
        running.generate(prompts(4, 9), 3, on_token=fail)
    assert running.generate(prompts(5), 3) == [alone(prompts(5)[0], 3)]


def test_a_seed_draws_the_same_tokens_whatever_else_is_generated() -> None:
    prompt = prompts(9)[0]
    draw = {"temperature": 1.5, "top_p": 0.9}
    expected = session(1).generate([prompt], 12, **draw, seed=7)[0]
    found = session(3).generate([*prompts(5, 40, seed=1), prompt], 12, **draw, seed=7)
    assert found[2] == expected
    other = session(1).generate([prompt], 12, **draw, seed=8)[0]
    assert other != expected
    assert session(1).generate([prompt], 12)[0] not in (expected, other)


def test_tokens_are_drawn_as_often_as_they_are_probable_and_never_beyond_top_p() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.25, 0.15])
    logits = (probabilities.log() * 2.0)[None]  # temperature 2 undoes it
    n = 1500
    sampler = Sampler(2.0, 0.75, 3, 1)
    counts = torch.zeros(4)
    for _ in range(n):
        counts[sampler.choose(logits, [0])[0]] += 1
    assert counts[0] == counts[3] == 0
    assert abs(float(counts[1]) / n - 2 / 3) < 0.04
    free = Sampler(2.0, 1.0, 3, 1)
    drawn = torch.tensor([free.choose(logits, [0])[0] for _ in range(n)])
    assert torch.allclose(torch.bincount(drawn, minlength=4) / n, probabilities, atol=0.04)


def test_the_most_probable_token_is_kept_however_small_top_p_is() -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(3.0, 1e-9, 0, 5)
    assert sampler.choose(logits, list(range(5))) == logits.argmax(-1).tolist()


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
        session(1).generate([[1]], 2, **sampling)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ([], 4, "a prompt is empty"),
        ([1.0, 2.0], 4, r"must be a list of integers, got float64 \[2\]"),
        (torch.zeros(3), 4, r"must be a list of integers, got float32 \[3\]"),
        (1, 4, r"must be a list of integers, got int64 \[\]"),
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
    running = session(2)
    with pytest.raises(EngineError, match=message):
        running.generate([[1, 2], prompt], tokens)
    assert not running.backend.calls  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [0, 3])
def test_a_batch_has_a_prompt_for_each_of_its_first_slots(count: int) -> None:
    with pytest.raises(EngineError, match=f"{count} prompts for 2 batch slots; .*--batch"):
        session(2).generate([[1]] * count, 4)


def test_a_prompt_may_fill_the_lists_to_the_last_slot() -> None:
    changes = {"window": 300, "pages_per_list": 1}
    prompt = prompts(58)[0]
    expected = [alone(prompt, 6, **changes)]
    assert session(1, toy_manifest(**changes)).generate([prompt], 6) == expected  # type: ignore[arg-type]


def test_a_benchmark_counts_what_was_run() -> None:
    times = bench(session(2, toy_manifest(eos=tuple(range(V)))), prompt_length=20, new_tokens=12)
    assert (times.batch, times.context_tokens) == (2, 31)
    assert 0 < times.resident_tokens < 31
    assert times.decode_ms > 0
    assert times.tokens_per_second > 0
    assert times.filled_pages == 8
    assert times.filled_bytes == 8 * 64 * 14 * 4
