# SPDX-License-Identifier: Apache-2.0
"""What a causal LM still knows, and what its KV cache holds while it answers. Converted or not.

Everything is measured through the cache that `generate` uses: contexts are read first, in chunks,
so that what was evicted is gone when the questions come.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from modelopt_dms.evaluation.footprint import Footprint, footprint, mean_footprint
from modelopt_dms.evaluation.ruler_open import OpenPrompt
from modelopt_dms.evaluation.tasks import Episode
from modelopt_dms.kvcache.hf_cache import cache_argument, cache_of

ACCURACY, PERPLEXITY = "accuracy", "perplexity"
BATCH = 8  # sequences at a time

Row = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """A result and the cache it was reached with.

    Attributes:
        metric: "accuracy" (0..1) or "perplexity".
        value: the result.
        count: questions asked, or tokens predicted.
        context: the cache when the context had been read, before the first question.
        end: the cache at the end of the conversation or text.
    """

    metric: str
    value: float
    count: int
    context: Footprint
    end: Footprint

    def row(self) -> Row:
        """The result with the cache at its end, for a table or a JSON file."""
        return {
            "metric": self.metric,
            "value": self.value,
            "count": self.count,
            "context_tokens": self.end.context_tokens,
            "resident_tokens": self.end.resident_tokens,
            "kv_bytes": self.end.kv_bytes,
            "dense_bytes": self.end.dense_bytes,
            "compression_ratio": self.end.compression_ratio,
            "context_compression_ratio": self.context.compression_ratio,
        }


@dataclass(frozen=True)
class Part:
    """What a few samples gave; the parts of a task add up to its score.

    Attributes:
        total: questions answered rightly, shares of words found, or the loss in nats.
        count: questions asked, or tokens predicted.
        sequences: samples.
        context: their caches before the first question.
        end: their caches at the end.
    """

    total: float
    count: int
    sequences: int
    context: Footprint
    end: Footprint

    @classmethod
    def of(cls, row: Row) -> "Part":
        """From what `dataclasses.asdict` made of one, and JSON of that."""
        caches = {name: Footprint(**row[name]) for name in ("context", "end")}
        return cls(**{**row, **caches})


def add_up(metric: str, parts: Sequence[Part]) -> Score:
    """The score of all parts of a task.

    Raises:
        ValueError: there are none.
    """
    if not parts:
        raise ValueError("no samples to score")
    count = sum(x.count for x in parts)
    mean = sum(x.total for x in parts) / count
    return Score(
        metric,
        math.exp(mean) if metric == PERPLEXITY else mean,
        count,
        mean_footprint([(x.sequences, x.context) for x in parts]),
        mean_footprint([(x.sequences, x.end) for x in parts]),
    )


def score_task(
    model: PreTrainedModel,
    episodes: Sequence[Episode],
    batch_size: int = BATCH,
    chunk: int = 512,
) -> Score:
    """Share of questions answered exactly, in conversations on a cache that forgets.

    The contexts are read first; then all turns of a conversation follow on the cache that is left,
    with the right answers in place. A question counts if every answer token is the arg-max given
    what came before it: that is when greedy generation would give exactly this answer.

    Args:
        model: a causal LM in eval mode.
        episodes: conversations; those of equal lengths are run together, so nothing is padded.
        batch_size: conversations at a time; has no influence on the result.
        chunk: context tokens in one forward; has no influence on the result.
    """
    batches = batches_of(episodes, batch_size)
    return add_up(ACCURACY, [exact_part(model, batch, chunk) for batch in batches])


@torch.no_grad()
def exact_part(model: PreTrainedModel, batch: Sequence[Episode], chunk: int = 512) -> Part:
    """Questions answered exactly in conversations of one length."""
    cache, last = read_contexts(model, batch, chunk)
    before = footprint(cache)
    hits = answer_on(model, cache, last, batch)
    return Part(sum(map(sum, hits)), sum(map(len, hits)), len(batch), before, footprint(cache))


@torch.no_grad()
def read_contexts(
    model: PreTrainedModel, batch: Sequence[Episode], chunk: int = 512
) -> tuple[Cache, Tensor]:
    """The cache of a model that has read contexts of one length, and what it says next, as ids [B, 1]."""
    ids = torch.tensor([episode.context_ids for episode in batch], device=model.device)
    cache: Any = None
    last = ids[:, :0]
    for part in ids.split(chunk, dim=1):
        given = cache_argument(type(model).forward, cache)
        out = model(input_ids=part, use_cache=True, logits_to_keep=1, **given)
        cache, last = cache_of(out), out.logits.argmax(-1)
    return cache, last


@torch.no_grad()
def answer_on(
    model: PreTrainedModel, cache: Cache, last: Tensor, batch: Sequence[Episode]
) -> list[list[bool]]:
    """Which questions are answered exactly on a cache that holds the contexts; see `score_task`. The cache grows.

    Args:
        model: that read the contexts.
        cache: what is left of them.
        last: what the model says after the contexts [B, 1].
        batch: conversations of one length.
    """
    turns = torch.tensor([_conversation(episode) for episode in batch], device=model.device)
    given = cache_argument(type(model).forward, cache)
    out = model(input_ids=turns, use_cache=True, **given)
    # What is predicted for turn token t was said at token t - 1.
    predicted = torch.cat([last, out.logits[:, :-1].argmax(-1)], dim=1)
    found = []
    for episode, hits in zip(batch, predicted == turns, strict=True):
        position, right = 0, []
        for question in episode.questions:
            start = position + len(question.prompt_ids)
            position = start + len(question.answer_ids)
            right.append(bool(hits[start:position].all()))
        found.append(right)
    return found


def perplexity(
    model: PreTrainedModel,
    samples: Sequence[Sequence[int]],
    batch_size: int = BATCH,
    chunk: int = 256,
) -> Score:
    """Perplexity of token sequences of one length, read in chunks through the cache.

    Neither `batch_size` nor `chunk` has an influence on the result.
    """
    batches = texts_of(samples, batch_size)
    return add_up(PERPLEXITY, [text_part(model, batch, chunk) for batch in batches])


def texts_of(
    samples: Sequence[Sequence[int]], size: int = BATCH
) -> Iterator[Sequence[Sequence[int]]]:
    """Groups of at most `size` samples.

    Raises:
        ValueError: their lengths differ, or nothing can be predicted.
    """
    lengths = {len(sample) for sample in samples}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"samples must have one length of at least 2 tokens, got {sorted(lengths)}"
        )
    return (samples[start : start + size] for start in range(0, len(samples), size))


@torch.no_grad()
def text_part(model: PreTrainedModel, batch: Sequence[Sequence[int]], chunk: int = 256) -> Part:
    """Loss of the tokens of samples of one length, from the second on."""
    ids = torch.tensor(batch, device=model.device)
    loss, count = 0.0, 0
    cache: Any = None
    last = None
    for part in ids.split(chunk, dim=1):
        given = cache_argument(type(model).forward, cache)
        out = model(input_ids=part, use_cache=True, **given)
        logits = out.logits if last is None else torch.cat([last, out.logits], dim=1)
        targets = part[:, 1:] if last is None else part
        cache, last = cache_of(out), out.logits[:, -1:]
        loss += F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum"
        ).item()
        count += targets.numel()
    end = footprint(cache)
    return Part(loss, count, len(batch), end, end)


def score_open(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[OpenPrompt]
) -> Score:
    """Mean share of the wanted words that greedy generation says, each prompt on its own cache that forgets."""
    return add_up(ACCURACY, [open_part(model, tokenizer, prompt)[0] for prompt in prompts])


def open_part(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: OpenPrompt
) -> tuple[Part, str]:
    """What share of the wanted words greedy generation says to a prompt, and what it says."""
    cache, _ = read_contexts(model, [Episode(prompt.task, prompt.context_ids, [])])
    before = footprint(cache)
    ids = write_on(model, cache, prompt.prompt_ids, prompt.tokens, stop_ids(model, tokenizer))
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Part(prompt.share(text), 1, 1, before, footprint(cache)), text


@torch.no_grad()
def write_on(
    model: PreTrainedModel, cache: Cache, ids: Sequence[int], tokens: int, stop: Sequence[int]
) -> list[int]:
    """At most so many tokens that greedy decoding writes after ids on a cache, which grows; without the stop token."""
    fed = torch.tensor([list(ids)], device=model.device)
    written: list[int] = []
    while len(written) < tokens:
        given = cache_argument(type(model).forward, cache)
        out = model(input_ids=fed, use_cache=True, logits_to_keep=1, **given)
        token = int(out.logits[0, -1].argmax())
        if token in stop:
            break
        written.append(token)
        fed = fed.new_tensor([[token]])
    return written


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    several = found if isinstance(found, list) else [found]
    return tuple(x for x in (*several, tokenizer.eos_token_id) if isinstance(x, int))


def _conversation(episode: Episode) -> list[int]:
    """All turns, with the right answers, as one text."""
    parts = [ids for x in episode.questions for ids in (x.prompt_ids, x.answer_ids)]
    return [token for ids in parts for token in ids]


def batches_of(episodes: Sequence[Episode], size: int) -> Iterator[list[Episode]]:
    """Groups of at most `size` episodes with contexts, and turns together, of equal length."""
    alike: dict[tuple[int, int], list[Episode]] = {}
    for episode in episodes:
        lengths = (len(episode.context_ids), len(_conversation(episode)))
        alike.setdefault(lengths, []).append(episode)
    for group in alike.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
