# SPDX-License-Identifier: Apache-2.0
"""Installed text in runs of a wanted number of tokens, and chats as text. Knows no facts."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from modelopt_dms.data.installed_text import definitions, english, python_source, sentences

# Below this no template of a chat leaves room for anything.
SHORTEST = 32


@dataclass(frozen=True)
class Asked:
    """A question in a document, and what it can only be answered with if it was kept from above."""

    question: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """Token ids of one document, and what they were made of.

    Attributes:
        kind: a name of `SHARES`.
        ids: token ids, special tokens included.
        text: that was tokenized.
        asked: questions in their order; none if it is no chat.
    """

    kind: str
    ids: list[int]
    text: str
    asked: tuple[Asked, ...] = ()


Turn = tuple[str, str]


@dataclass
class Writer:
    """Everything a document is written with.

    Attributes:
        tokenizer: the model's.
        rng: draws everything.
        length: tokens that a document may have.
    """

    tokenizer: PreTrainedTokenizerBase
    rng: random.Random
    length: int
    _sizes: dict[str, int] = field(default_factory=dict)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def size(self, text: str) -> int:
        """Tokens of a text."""
        if text not in self._sizes:
            self._sizes[text] = len(self.encode(text))
        return self._sizes[text]

    def chat(self, turns: list[Turn]) -> str:
        """A chat in the tokenizer's template; in plain words if it has none, or one that refuses the chat."""
        if self.tokenizer.chat_template is None:
            lines = (f"{role.capitalize()}: {text}" for role, text in turns)
            return str(self.tokenizer.bos_token or "") + "\n\n".join(lines) + "\n"
        messages = [{"role": role, "content": text} for role, text in turns]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def prose(self) -> Iterator[str]:
        """Sentences: paragraphs of one source in their order, from a random place, then another source; endless.

        The first of a paragraph begins with a newline.
        """
        sources = english("calibration")
        names = list(sources)
        weights = [len(sources[x]) * (4 if x.startswith("topic:") else 1) for x in names]
        while True:
            paragraphs = sources[self.rng.choices(names, weights)[0]]
            start = self.rng.randrange(len(paragraphs))
            for paragraph in paragraphs[start : start + 6]:
                first, *rest = sentences(paragraph)
                yield "\n" + first
                yield from rest

    def code(self) -> Iterator[str]:
        """Definitions of one module in their order, from a random one, then another module; endless."""
        modules = python_source("calibration")
        names = list(modules)
        weights = [min(len(modules[x]), 30_000) for x in names]
        while True:
            pieces = definitions(modules[self.rng.choices(names, weights)[0]])
            yield from pieces[self.rng.randrange(len(pieces)) :]

    def run(self, parts: Iterator[str], tokens: int, join: str = " ") -> str:
        """Parts from the beginning of an iterator, of at most so many tokens together; at least one, if it is short."""
        taken: list[str] = []
        total = 0
        for part in parts:
            total += self.size(part) + 1
            if total > tokens:
                break
            taken.append(part)
        return join.join(taken).strip().replace(" \n", "\n\n")

    def passage(self, tokens: int) -> str:
        """Prose or code of at most so many tokens, cut at its end where nothing shorter is to be had."""
        if self.rng.random() < 0.7:
            return self.run(self.prose(), tokens)
        lines = (line for piece in self.code() for line in piece.splitlines(keepends=True))
        return self.run(lines, tokens, "").strip()

    def cut(
        self, text: str, kind: str, asked: tuple[Asked, ...] = (), *, special: bool = False
    ) -> Document:
        """The document of a text, which loses its end if it is too long."""
        ids = self.encode(text, special=special)[: self.length]
        return Document(kind, ids, text, asked)
