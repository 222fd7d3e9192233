# SPDX-License-Identifier: Apache-2.0
"""Installed text in runs of a wanted number of tokens, and chats as text."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modelopt_dms.data.installed_text import definitions, english, python_source, sentences
from modelopt_dms.data.records import Chat
from modelopt_dms.data.template import Template

# Of the runs of prose; the others are docstrings, which are shorter.
_TEXTS_SHARE = 0.6
_TEXTS = Path(__file__).parent / "prose"
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


@cache
def own_texts() -> tuple[tuple[str, ...], ...]:
    """Paragraphs of every text that was written for the mix, by name of its file."""
    files = sorted(_TEXTS.glob("*.txt"))
    return tuple(tuple(x.read_text(encoding="utf-8").strip().split("\n\n")) for x in files)


@dataclass
class Writer:
    """Everything a document is written with.

    Attributes:
        tokenizer: the model's.
        rng: draws everything.
        length: tokens that a document may have.
        taken: values and paragraphs that the document has already.
    """

    tokenizer: PreTrainedTokenizerBase
    rng: random.Random
    length: int
    taken: set[str] = field(default_factory=set)
    _sizes: dict[str, int] = field(default_factory=dict)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def size(self, text: str) -> int:
        """Tokens of a text."""
        if text not in self._sizes:
            # Within a text, a sentence has a space in front.
            self._sizes[text] = len(self.encode(text if text.startswith("\n") else " " + text))
        return self._sizes[text]

    def chat(self, turns: list[Turn]) -> str:
        """A chat in the tokenizer's template; in plain words if it has none, or one that refuses the chat."""
        if self.tokenizer.chat_template is None:
            lines = (f"{role.capitalize()}: {text}" for role, text in turns)
            return str(self.tokenizer.bos_token or "") + "\n\n".join(lines) + "\n"
        messages = [{"role": role, "content": text} for role, text in turns]
        return Template(self.tokenizer, Chat([], {}), "mix").render(messages)

    def prose(self) -> Iterator[str]:
        """Sentences without end: one of our own texts from some paragraph on, or docstrings of one module, and so on.

        The first of a paragraph begins with an empty line.
        """
        sources = english("calibration")
        names = list(sources)
        weights = [len(sources[x]) for x in names]
        texts = self.rng.sample(own_texts(), len(own_texts()))
        while True:
            paragraphs: Sequence[str]
            if texts and self.rng.random() < _TEXTS_SHARE:
                paragraphs = texts.pop()
                paragraphs = paragraphs[self.rng.randrange((len(paragraphs) + 1) // 2) :]
            else:
                paragraphs = sources[self.rng.choices(names, weights)[0]]
                start = self.rng.randrange(len(paragraphs))
                paragraphs = paragraphs[start : start + 4]
            for paragraph in paragraphs:
                if paragraph in self.taken:
                    continue
                self.taken.add(paragraph)
                first, *rest = sentences(paragraph)
                yield "\n\n" + first
                yield from rest

    def code(self) -> Iterator[str]:
        """Definitions of one module in their order, from a random one, then another module; endless."""
        modules = python_source("calibration")
        names = list(modules)
        weights = [min(len(modules[x]), 30_000) for x in names]
        while True:
            pieces = definitions(modules[self.rng.choices(names, weights)[0]])
            yield from pieces[self.rng.randrange(len(pieces)) :]

    def pick(self, parts: Iterator[str], tokens: int) -> list[str]:
        """Parts from the beginning of an iterator, of about so many tokens together."""
        taken = []
        for part in parts:
            tokens -= self.size(part)
            if tokens < 0:
                break
            taken.append(part)
        return taken

    def passage(self, tokens: int) -> str:
        """Prose or lines of code, of about so many tokens; empty if the first sentence is longer."""
        if self.rng.random() < 0.7:
            return join(self.pick(self.prose(), tokens))
        lines = (line for piece in self.code() for line in piece.splitlines(keepends=True))
        return "".join(self.pick(lines, tokens)).strip()

    def cut(
        self, text: str, kind: str, asked: tuple[Asked, ...] = (), *, special: bool = False
    ) -> Document:
        """The document of a text, which loses its end if it is too long."""
        ids = self.encode(text, special=special)[: self.length]
        return Document(kind, ids, text, asked)


def join(pieces: Sequence[str]) -> str:
    """Sentences with a space between them, or an empty line where one of them has it."""
    text = " ".join(pieces)
    return (
        text.replace(" \n\n", "\n\n").replace("\n\n ", "\n\n").replace("\n\n\n\n", "\n\n").strip()
    )
