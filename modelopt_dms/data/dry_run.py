# SPDX-License-Identifier: Apache-2.0
"""What a retrofit would read and visit, counted before it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.recipe import Recipe, load_recipe
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.data.mixing import PreparedData, Tally, open_sources, prepare_samples
from modelopt_dms.data.records import Tokens

EXCERPT = 200


@dataclass(frozen=True)
class SourcePreview:
    """One source of the data.

    Attributes:
        name: its files, or its place in the data.
        records: that it has.
        documents: that the run reads, or all.
        tokens: of these documents.
        longest: tokens of the longest of them.
        wanted: share of the tokens that it was given.
        share: of the tokens that the run visits.
        epochs: how often the run visits each of its samples, on average.
        excerpt: the beginning of the first document read, as the model sees it.
    """

    name: str
    records: int
    documents: int
    tokens: int
    longest: int
    wanted: float
    share: float
    epochs: float
    excerpt: str


@dataclass(frozen=True)
class Preview:
    """What a retrofit reads and visits.

    Attributes:
        sources: in the order of the data.
        samples: packed ones to train on.
        held_out: samples to measure on.
        steps: of the optimizer.
        samples_per_step: that all processes visit together.
        length: tokens of a sample.
        padding: share of what is visited that is padding.
        in_effect: share of the visited tokens, padding apart, whose eviction can take effect: more than a delay window
            of their document follows, and they are not protected.
    """

    sources: tuple[SourcePreview, ...]
    samples: int
    held_out: int
    steps: int
    samples_per_step: int
    length: int
    padding: float
    in_effect: float

    @property
    def tokens(self) -> int:
        """Tokens visited, padding included."""
        return self.steps * self.samples_per_step * self.length

    def summary(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {**asdict(self), "tokens": self.tokens}


def preview(
    data: Any,
    recipe: Recipe | str | Path = "dms_cr4",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    count_all: bool = False,
) -> Preview:
    """Count what a retrofit in one process would read and visit. Needs no model.

    Args:
        data: see `modelopt_dms.data.documents.ACCEPTED`.
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe.
        tokenizer: needed unless the data are token ids.
        overrides: changes to the recipe, {"dms.window": 512} or ["dms.window=512"].
        count_all: tokenize all documents, not only those that the run reads, and count them.

    Raises:
        ValueError: data or recipe are not usable, or the recipe retrofits nothing.
    """
    recipe = load_recipe(recipe, overrides)
    dms, retrofit = recipe.dms, recipe.retrofit
    if dms is None or retrofit is None:
        raise ValueError("the recipe has no retrofit, so there is nothing to preview")
    sources = open_sources(data, tokenizer, None)
    prepared = prepare_samples(
        sources,
        length=retrofit.sequence_length,
        window=dms.window,
        wanted=retrofit.visits(1),
        seed=retrofit.seed,
    )
    tallies = None
    if count_all:
        tallies = [Tally() for _ in sources]
        for tally, source in zip(tallies, sources, strict=True):
            for _ in tally.count(source.documents):
                pass
    return preview_prepared(prepared, dms, retrofit, tokenizer, tallies=tallies)


def preview_prepared(
    data: PreparedData,
    dms: DMSConfig,
    retrofit: RetrofitConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    processes: int = 1,
    tallies: Sequence[Tally] | None = None,
) -> Preview:
    """Count samples that are packed already; `tallies` replace the counts of what was read to make them.

    Without a tokenizer, excerpts are token ids.
    """
    samples = data.training
    visits = retrofit.visits(processes)
    order = data.visits(visits, retrofit.seed).order
    filled = (samples.tokens_ahead >= 0).sum(1)  # [N]
    evictable = (samples.tokens_ahead > dms.window) & (samples.position_ids >= dms.protect_first)
    visited = int(filled[order].sum())
    times = order.bincount(minlength=len(samples))
    sources, start = [], 0
    for index, part in enumerate(data.parts):
        own = slice(start, start + part.samples)
        start += part.samples
        read = part.read if tallies is None else tallies[index]
        sources.append(
            SourcePreview(
                name=part.name,
                records=part.records,
                documents=read.documents,
                tokens=read.tokens,
                longest=read.longest,
                wanted=part.share,
                share=int((times[own] * filled[own]).sum()) / visited,
                epochs=int(times[own].sum()) / part.samples,
                excerpt=_excerpt(part.read.first, tokenizer),
            )
        )
    return Preview(
        sources=tuple(sources),
        samples=len(samples),
        held_out=len(data.held_out),
        steps=retrofit.steps,
        samples_per_step=visits // retrofit.steps,
        length=retrofit.sequence_length,
        padding=1 - visited / (visits * retrofit.sequence_length),
        in_effect=int(evictable.sum(1)[order].sum()) / visited,
    )


def _excerpt(document: Tokens, tokenizer: PreTrainedTokenizerBase | None) -> str:
    # No token is shorter than a byte, and few characters have more than four.
    beginning = np.asarray(document[: 4 * EXCERPT]).tolist()
    if tokenizer is None:
        return " ".join(map(str, beginning))[:EXCERPT]
    return str(tokenizer.decode(beginning))[:EXCERPT]
