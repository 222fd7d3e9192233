# SPDX-License-Identifier: Apache-2.0
"""One text in several KV caches, and what each of them still answers. Knows no recipes, no tables and no pictures.

    full        everything
    dms         what the gates kept, decided token by token while the text was read
    keydiff     the keys least like the others, chosen when the text had been read
    streaming   the first 4 tokens and the newest

The last two hold exactly as many tokens a head as the gates left on average, and evict nothing afterwards. No method
knows a question before the text has been read and cut.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from modelopt_dms.evaluation import peers
from modelopt_dms.evaluation.footprint import Footprint, footprint
from modelopt_dms.evaluation.prose import reference_sentences
from modelopt_dms.evaluation.ruler import chat_frame
from modelopt_dms.evaluation.tasks import Episode, make_episodes
from modelopt_dms.evaluation.words import KEYS
from modelopt_dms.kvcache.hf_cache import cache_argument, cache_of

METHODS = {
    "full": "full cache",
    "dms": "DMS",
    "keydiff": "KeyDiff",
    "streaming": "StreamingLLM",
}


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, what is asked about it, how the answer begins, and what must follow."""

    text: str
    question: str
    begun: str
    right: str


FACTS = (
    Fact(
        "One of the special magic numbers for castle is: 48213.",
        "What is the special magic number for castle mentioned in the provided text?",
        "The special magic number for castle mentioned in the provided text is",
        "48213",
    ),
    Fact(
        "If the pump fails again, call Miriam Okafor, her phone number is 555-0172.",
        "What is the phone number of Miriam Okafor?",
        "The phone number of Miriam Okafor is",
        "555-0172",
    ),
    Fact(
        "The budget meeting has been moved to Thursday at 3:40 in the afternoon.",
        "To which day has the budget meeting been moved?",
        "The budget meeting has been moved to",
        "Thursday",
    ),
    Fact(
        "Grandmother hid the silver ring inside the blue teapot.",
        "Where did Grandmother hide the silver ring?",
        "Grandmother hid the silver ring inside the",
        "blue teapot",
    ),
    Fact(
        "The wifi password of the cabin is moonlight77.",
        "What is the wifi password of the cabin?",
        "The wifi password of the cabin is",
        "moonlight77",
    ),
)


@dataclass(frozen=True)
class Ask:
    """A question, as token ids with the begun answer included, and the text that must follow."""

    question: str
    ids: list[int]
    right: str


@dataclass(frozen=True)
class Story:
    """A text in which facts stand far apart, and a question about each.

    Attributes:
        ids: token ids of the text, without the questions.
        asks: one for each of the facts.
        spans: where each fact stands, as ranges of token positions.
    """

    ids: list[int]
    asks: list[Ask]
    spans: list[range]


@dataclass(frozen=True)
class Memory:
    """A model and the cache with which it has read a text of token ids."""

    model: Any
    cache: Cache
    ids: list[int]

    @property
    def footprint(self) -> Footprint:
        """What the cache holds."""
        return footprint(self.cache)

    def answer(self, ask: Ask, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """What greedy `generate` says, up to the end of the line, on a copy of the cache."""
        ids = torch.tensor([self.ids + ask.ids], device=self.model.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(self.model.forward, copy.deepcopy(self.cache)),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,  # never used: there is one sequence
        )
        said = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        return said.strip().split("\n")[0]


@torch.no_grad()
def read(model: Any, ids: Sequence[int]) -> Cache:
    """The cache of a model that has read token ids [T]."""
    tokens = torch.tensor([list(ids)], device=model.device)
    empty = cache_argument(model.forward, DynamicCache())
    return cache_of(model(input_ids=tokens, use_cache=True, logits_to_keep=1, **empty))


def memories(
    plain: PreTrainedModel | None, model: PreTrainedModel, ids: list[int]
) -> dict[str, Memory]:
    """A text in memory, by method.

    Args:
        plain: the model before it was converted, or its plain twin; None: only DMS remembers.
        model: the DMS model.
        ids: token ids of the text.
    """
    dms = Memory(model, read(model, ids), ids)
    if plain is None:
        return {"dms": dms}
    full, kept = read(plain, ids), round(dms.footprint.resident_tokens)
    return {
        "full": Memory(plain, full, ids),
        "dms": dms,
        "keydiff": Memory(plain, peers.cut(full, peers.keydiff, kept), ids),
        "streaming": Memory(plain, peers.cut(full, peers.sinks_and_recent, kept), ids),
    }


def story(tokenizer: PreTrainedTokenizerBase, length: int, facts: Sequence[Fact] = FACTS) -> Story:
    """Facts spread evenly over about `length` tokens of Python's language reference.

    Raises:
        ValueError: the facts alone are longer.
    """
    head, tail = chat_frame(tokenizer)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    hidden = [encode(f" {fact.text}") for fact in facts]
    start = encode(f"{head}Read this text. I will ask you about it afterwards.\n\n")
    room = length - len(start) - sum(map(len, hidden))
    if room < 0:
        raise ValueError(f"length={length} has no room for {len(facts)} facts")
    prose: list[list[int]] = []
    for sentence in reference_sentences():
        ids = encode(f" {sentence}")
        if len(ids) > room:
            break
        prose.append(ids)
        room -= len(ids)
    places = [round((i + 0.5) * len(prose) / len(facts)) for i in range(len(facts))]
    ids, spans = list(start), []
    for i in range(len(prose) + 1):
        for fact, place in zip(hidden, places, strict=True):
            if place == i:
                spans.append(range(len(ids), len(ids) + len(fact)))
                ids += fact
        ids += prose[i] if i < len(prose) else []
    asks = [Ask(x.question, encode(f"\n\n{x.question}{tail}{x.begun}"), x.right) for x in facts]
    return Story(ids, asks, spans)


def knows_records(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer was made for `evaluation.tasks`: every key is one token. Such models know no English."""
    ids = tokenizer([f" {key}" for key in KEYS], add_special_tokens=False)["input_ids"]
    return all(len(x) == 1 for x in ids)


def records(tokenizer: PreTrainedTokenizerBase, length: int, seed: int, count: int) -> Story:
    """A text of `length` tokens of the task "recall", for tokenizers that know its words."""
    (episode,) = make_episodes("recall", tokenizer, length, 1, seed, questions=count)
    text = episode.context_ids
    spans = []
    for question in episode.questions:
        key = str(tokenizer.decode(question.prompt_ids)).split()[-1]
        answer = str(tokenizer.decode(question.answer_ids)).strip()
        fact = list(tokenizer(f"keep {key} {answer}\n", add_special_tokens=False)["input_ids"])
        starts = (i for i in range(len(text)) if text[i : i + len(fact)] == fact)
        spans += [range(i, i + len(fact)) for i in starts]
    return Story(text, asks_of(episode, tokenizer), spans)


def asks_of(episode: Episode, tokenizer: PreTrainedTokenizerBase) -> list[Ask]:
    """The questions of a prompt of `evaluation.ruler`."""
    return [
        Ask(
            str(tokenizer.decode(x.prompt_ids)).strip(),
            x.prompt_ids,
            str(tokenizer.decode(x.answer_ids)).strip(),
        )
        for x in episode.questions
    ]


def is_right(answer: str, right: str) -> bool:
    """Whether the answer has the right words in it, as RULER counts."""
    return right.casefold() in answer.casefold()
