# SPDX-License-Identifier: Apache-2.0
"""Accuracy and KL over the compression ratio: DMS along the model's curve, beside caches that are cut to equal size."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from modelopt_dms.evaluation import peers
from modelopt_dms.evaluation.fidelity import compare, full_hidden
from modelopt_dms.evaluation.footprint import footprint
from modelopt_dms.evaluation.memories import read
from modelopt_dms.evaluation.score import answer_on, read_contexts
from modelopt_dms.evaluation.tasks import Episode
from modelopt_dms.gates.curve import CompressionError
from modelopt_dms.gates.thresholds import (
    curve_of,
    move_thresholds,
    set_compression,
    thresholds_of,
)
from modelopt_dms.kvcache.hf_cache import cache_argument

TAIL = 128  # tokens at the end of a text whose KL is taken: peers cut their caches in front of them
CUTS: dict[str, peers.Choose] = {"keydiff": peers.keydiff, "streaming": peers.sinks_and_recent}
# Called before and after a measurement with what it costs, in readings of a text; False: time is up.
Step = Callable[[], bool]


@dataclass(frozen=True)
class Point:
    """What one method did at one setting.

    Attributes:
        method: "full", "dms", or a peer.
        asked: compression ratio that was asked for; None is the model as it is, or no compression.
        ratio: that was reached, context over resident tokens.
        task: a family, or a category of text.
        right: questions answered exactly; None of texts.
        count: questions asked, or tokens compared.
        kl: mean KL from the full cache over the last TAIL tokens, nats a token; None of families.
        top1: share of them with the same most likely token.
    """

    method: str
    asked: float | None
    ratio: float
    task: str
    right: int | None
    count: int
    kl: float | None = None
    top1: float | None = None


def reachable(
    model: PreTrainedModel, wanted: Sequence[float], length: int
) -> tuple[list[float | None], list[str]]:
    """Those of the wanted ratios that the model's curve reaches, and why others are left out, a line each.

    Without any, [None]: the model as it is.
    """
    if getattr(model.config, "dms_curve", None) is None:
        shown = ", ".join(f"{x:g}" for x in wanted)
        return [None], [f"Ratios {shown} are not shown: the model carries no curve to set it by."]
    curve, found, lines = curve_of(model), list[float | None](), []
    for ratio in wanted:
        try:
            curve.at(ratio, length)
        except CompressionError as error:
            lines.append(f"Ratio {ratio:g} is not shown: {error}.")
        else:
            found.append(ratio)
    return found or [None], lines


@contextmanager
def thresholds_kept(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the thresholds may move."""
    before = thresholds_of(model)
    try:
        yield
    finally:
        move_thresholds(model, before, 0.0)


def _set(model: PreTrainedModel, ratio: float | None, length: int) -> None:
    if ratio is not None:
        set_compression(model, ratio, length=length)


def measure_answers(
    model: PreTrainedModel,
    twin: PreTrainedModel | None,
    prompts: dict[str, list[Episode]],
    ratios: Sequence[float | None],
    length: int,
    step: Step,
) -> list[Point]:
    """Questions answered exactly, until no prompt is left or time is up; the first of every family is always asked."""
    sums = _Sums()
    with thresholds_kept(model):
        for turn in zip(*prompts.values(), strict=True):
            in_time = True
            for family, episode in zip(prompts, turn, strict=True):
                _ask(model, twin, family, episode, ratios, length, sums)
                in_time = step()
            if not in_time:
                break
    return sums.points()


def _ask(
    model: PreTrainedModel,
    twin: PreTrainedModel | None,
    family: str,
    episode: Episode,
    ratios: Sequence[float | None],
    length: int,
    sums: "_Sums",
) -> None:
    """One prompt by all methods."""
    full = None if twin is None else read_contexts(twin, [episode])
    if twin is not None and full is not None:
        hits = answer_on(twin, copy.deepcopy(full[0]), full[1], [episode])
        sums.add(("full", None, family), hits[0], 1.0)
    for ratio in ratios:
        _set(model, ratio, length)
        cache, last = read_contexts(model, [episode])
        held = footprint(cache)
        hits = answer_on(model, cache, last, [episode])
        sums.add(("dms", ratio, family), hits[0], held.compression_ratio)
        if twin is None or full is None:
            continue
        kept = round(held.resident_tokens)
        for name, choose in CUTS.items():
            hits = answer_on(twin, peers.cut(full[0], choose, kept), full[1], [episode])
            sums.add((name, ratio, family), hits[0], held.context_tokens / kept)


class _Sums:
    """Answers by method, ratio and family."""

    def __init__(self) -> None:
        self.hits: dict[tuple[str, float | None, str], list[bool]] = {}
        self.shares: dict[tuple[str, float | None, str], list[float]] = {}

    def add(self, key: tuple[str, float | None, str], hits: list[bool], ratio: float) -> None:
        self.hits.setdefault(key, []).extend(hits)
        self.shares.setdefault(key, []).append(1.0 / ratio)

    def points(self) -> list[Point]:
        """One for each key; the ratio is that of the sums, contexts of a family being equally long."""
        return [
            Point(*key[:2], len(self.shares[key]) / sum(self.shares[key]), key[2], sum(x), len(x))
            for key, x in self.hits.items()
        ]


@torch.no_grad()
def measure_kl(
    model: PreTrainedModel,
    twin: PreTrainedModel | None,
    texts: dict[str, list[int]],
    ratios: Sequence[float | None],
    step: Step,
) -> list[Point]:
    """Distance from the full cache over the last TAIL tokens of each text."""
    found: list[Point] = []
    with thresholds_kept(model):
        for category, ids in texts.items():
            context = len(ids) - TAIL
            full = full_hidden(model, ids)
            tail = None if twin is None else _Tail(twin, ids)
            for ratio in ratios:
                _set(model, ratio, len(ids))
                x = compare(model, ids, full)
                kl, same = x.kl[-TAIL:].double().mean().item(), x.same[-TAIL:].double().mean()
                resident = x.resident_tokens(context)
                about = (category, None, TAIL)
                found.append(Point("dms", ratio, context / resident, *about, kl, same.item()))
                for name, choose in CUTS.items() if tail is not None else ():
                    assert tail is not None
                    kept = round(resident)
                    distance = tail.distance(choose, kept)
                    found.append(Point(name, ratio, context / kept, *about, *distance))
            if not step():
                break
    return found


class _Tail:
    """The end of a text on a plain model, after the cache of what is before it was cut."""

    def __init__(self, twin: Any, ids: list[int]) -> None:
        self.twin, self.ids = twin, ids[-TAIL:]
        self.cache = read(twin, ids[:-TAIL])
        self.full = self._read(copy.deepcopy(self.cache))

    def _read(self, cache: Any) -> Tensor:
        tokens = torch.tensor([self.ids], device=self.twin.device)
        out = self.twin(
            input_ids=tokens, use_cache=True, **cache_argument(self.twin.forward, cache)
        )
        return out.logits[0].float().log_softmax(-1)

    def distance(self, choose: peers.Choose, kept: int) -> tuple[float, float]:
        """Mean KL, and share of tokens with the same most likely next token."""
        cut = self._read(peers.cut(self.cache, choose, kept))
        kl = F.kl_div(cut, self.full, reduction="none", log_target=True).sum(-1).clamp(min=0.0)
        same = (cut.argmax(-1) == self.full.argmax(-1)).double().mean()
        return kl.double().mean().item(), same.item()


def figures(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Points for a JSON file."""
    return [asdict(x) for x in points]
