# SPDX-License-Identifier: Apache-2.0
"""What a causal LM still knows, and what its KV cache holds while it answers. Converted or not.

Everything is measured through the cache that `generate` uses: contexts are read first, in chunks,
so that what was evicted is gone when the questions come.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from modelopt_dms.evaluation.conversations import make_conversations
from modelopt_dms.evaluation.names import CHATS, DEFAULT, RULER_EXACT, RULER_OPEN, TEXT, check_tasks
from modelopt_dms.evaluation.peers import CutLayer
from modelopt_dms.evaluation.ruler import make_prompts
from modelopt_dms.evaluation.ruler_open import OpenPrompt, make_open_prompts
from modelopt_dms.evaluation.tasks import Episode, held_out_text, make_episodes
from modelopt_dms.kvcache.hf_cache import DMSLayer, cache_argument, cache_of, kv_stats

QUESTIONS = (
    24  # in a conversation, if its context has facts for so many: reading costs more than asking
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Footprint:
    """What the KV cache of one sequence held, on average over sequences.

    Attributes:
        context_tokens: tokens seen.
        resident_tokens: tokens held by a KV head, mean over layers and heads.
        kv_bytes: bytes allocated for keys and values.
        compression_ratio: context over resident tokens, over layers and heads by bytes.
    """

    context_tokens: float
    resident_tokens: float
    kv_bytes: float
    compression_ratio: float


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
            "compression_ratio": self.end.compression_ratio,
            "context_compression_ratio": self.context.compression_ratio,
        }


def footprint(cache: Cache) -> Footprint:
    """What one sequence of a cache holds on average; a plain model's cache holds everything, unless it was `cut`."""
    if any(isinstance(layer, DMSLayer) for layer in cache.layers):
        stats = kv_stats(cache)
        sequences = len(stats.layers[0].context)
        return Footprint(
            stats.context_tokens,
            stats.resident_tokens,
            stats.kv_bytes / sequences,
            stats.compression_ratio,
        )
    layers: Sequence[Any] = cache.layers
    tensors = [x for layer in layers for x in (layer.keys, layer.values)]
    kv_bytes = sum(x.numel() * x.element_size() for x in tensors) / len(tensors[0])
    seen = cache.get_seq_length()
    live = seen - max((x.evicted for x in layers if isinstance(x, CutLayer)), default=0)
    return Footprint(seen, live, kv_bytes, seen / live)


@torch.no_grad()
def score_task(
    model: PreTrainedModel,
    episodes: Sequence[Episode],
    batch_size: int = 8,
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
    if not episodes:
        raise ValueError("no episodes to score")
    right, total = 0, 0
    contexts, ends = [], []
    for batch in _batches(episodes, batch_size):
        cache, last = read_contexts(model, batch, chunk)
        contexts.append((len(batch), footprint(cache)))
        hits = answer_on(model, cache, last, batch)
        ends.append((len(batch), footprint(cache)))
        right, total = right + sum(map(sum, hits)), total + sum(map(len, hits))
    return Score("accuracy", right / total, total, _mean(contexts), _mean(ends))


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


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, samples: Sequence[Sequence[int]], batch_size: int = 8, chunk: int = 256
) -> Score:
    """Perplexity of token sequences of one length, read in chunks through the cache.

    Neither `batch_size` nor `chunk` has an influence on the result.
    """
    lengths = {len(sample) for sample in samples}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"samples must have one length of at least 2 tokens, got {sorted(lengths)}"
        )
    loss, count = 0.0, 0
    ends = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        ids = torch.tensor(batch, device=model.device)
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
        ends.append((len(batch), footprint(cache)))
    end = _mean(ends)
    return Score("perplexity", math.exp(loss / count), count, end, end)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    count: int,
    seed: int,
    batch_size: int = 8,
) -> Score:
    """One task at one length: accuracy of a task's questions, or perplexity if `task` is "text"; see `evaluate`."""
    asked = material_of(tokenizer, task, length, count, seed)
    if task == TEXT:
        return perplexity(model, asked, batch_size)
    if task in RULER_OPEN:
        return score_open(model, tokenizer, asked)
    return score_task(model, asked, batch_size)


def material_of(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, count: int, seed: int
) -> Any:
    """What a model is asked in a task: texts, prompts or episodes.

    Raises:
        ValueError: an unknown task, or a length that has no room for it.
    """
    (task,) = check_tasks([task])
    where: Any = (tokenizer, length, count, seed)
    if task == TEXT:
        return held_out_text(*where)
    make: dict[str, Any] = dict.fromkeys(RULER_OPEN, make_open_prompts)
    make |= dict.fromkeys(CHATS, make_conversations)
    make |= dict.fromkeys(RULER_EXACT, make_prompts)
    if task in make:
        return make[task](task, *where)
    return make_episodes(_name(task), tokenizer, length, count, seed, QUESTIONS)


def _name(task: str) -> Any:
    """A checked name, for functions that take a literal."""
    return task


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = DEFAULT,
    lengths: Sequence[int] = (1024,),
    count: int = 16,
    seed: int = 0,
    batch_size: int = 8,
) -> list[Row]:
    """Every task at every length, as rows {task, length, metric, value, resident_tokens, ...}.

    Args:
        model: a causal LM; plain ones report a dense cache. Left in eval mode.
        tokenizer: the model's.
        tasks: some of `evaluation.names.EVALUATIONS`.
        lengths: context tokens.
        count: conversations or texts of a task and length.
        seed: draws them.
        batch_size: sequences at a time.
    """
    tasks = check_tasks(tasks)
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    model.eval()
    rows = []
    for task in tasks:
        for length in lengths:
            score = measure(model, tokenizer, task, length, count, seed, batch_size)
            rows.append({"task": task, "length": length, **score.row()})
    return rows


@dataclass(frozen=True)
class Said:
    """A generated answer, and the cache when its context had been read, and at its end."""

    text: str
    context: Footprint
    end: Footprint


def answer_open(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[OpenPrompt]
) -> list[Said]:
    """What greedy generation says to each prompt, on its own cache that forgets."""
    found = []
    for prompt in prompts:
        cache, _ = read_contexts(model, [Episode(prompt.task, prompt.context_ids, [])])
        before = footprint(cache)
        ids = write_on(model, cache, prompt.prompt_ids, prompt.tokens, stop_ids(model, tokenizer))
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        found.append(Said(text, before, footprint(cache)))
    return found


def mean_score(values: Sequence[float], answers: Sequence[Said]) -> Score:
    """The mean of what answers scored, and of their caches."""
    contexts, ends = [(1, x.context) for x in answers], [(1, x.end) for x in answers]
    return Score("accuracy", sum(values) / len(values), len(values), _mean(contexts), _mean(ends))


def score_open(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[OpenPrompt]
) -> Score:
    """Mean share of the wanted words that greedy generation says, each prompt on its own cache that forgets."""
    if not prompts:
        raise ValueError("no prompts to score")
    said = answer_open(model, tokenizer, prompts)
    return mean_score([x.share(y.text) for x, y in zip(prompts, said, strict=True)], said)


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


def _batches(episodes: Sequence[Episode], size: int) -> Iterator[list[Episode]]:
    """Groups of at most `size` episodes with contexts, and turns together, of equal length."""
    alike: dict[tuple[int, int], list[Episode]] = {}
    for episode in episodes:
        lengths = (len(episode.context_ids), len(_conversation(episode)))
        alike.setdefault(lengths, []).append(episode)
    for group in alike.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _mean(parts: list[tuple[int, Footprint]]) -> Footprint:
    """Mean over batches by their number of sequences; compression ratios as ratios of bytes."""
    total = sum(count for count, _ in parts)

    def mean(value: Callable[[Footprint], float]) -> float:
        return sum(count * value(part) for count, part in parts) / total

    return Footprint(
        mean(lambda x: x.context_tokens),
        mean(lambda x: x.resident_tokens),
        mean(lambda x: x.kv_bytes),
        1.0 / mean(lambda x: 1.0 / x.compression_ratio),
    )
