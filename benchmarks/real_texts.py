# SPDX-License-Identifier: Apache-2.0
"""Text to calibrate on and to measure on: what every machine has, or any path. Knows no models."""

import ast
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from modelopt_dms.evaluation.prose import reference_sentences
from modelopt_dms.evaluation.text import Split, source_files, text_lines

# Characters of a document to calibrate on; calibration cuts it to its own length.
DOCUMENT = 20_000
SHORTEST_DOCSTRING = 400


class _Text(HTMLParser):
    """The text of a page without scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.silent += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data)


def read_text(path: Path) -> str:
    """A text or HTML file, or all of a directory in the order of their names, as one text."""
    if path.is_dir():
        files = sorted(x for x in path.rglob("*") if x.suffix in (".txt", ".md", ".html"))
        return "\n".join(read_text(x) for x in files)
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".html":
        page = _Text()
        page.feed(text)
        text = re.sub(r"[ \t\xa0]+", " ", "".join(page.parts))
        text = re.sub(r"\s*\n\s*", "\n", text)
    return text


def categories(tokenizer: Any, given: dict[str, Path], seed: int) -> dict[str, str]:
    """Texts to measure on by category: prose, code, chat, and what else was given by path.

    Without a path: prose is Python's language reference, code is source of the standard library that is never
    calibrated on, and chat is the reference again, told in turns of the chat template if there is one.
    """
    rng = random.Random(f"categories/{seed}")
    lines = text_lines("held_out", rng)
    found = {
        "prose": " ".join(reference_sentences()),
        "code": "".join(next(lines) for _ in range(20_000)),
    }
    if tokenizer.chat_template is not None:
        found["chat"] = _told_in_turns(tokenizer, rng)
    return found | {name: read_text(path) for name, path in given.items()}


def _told_in_turns(tokenizer: Any, rng: random.Random) -> str:
    sentences = list(reference_sentences())
    turns = []
    while sentences:
        count = rng.randint(1, 6)
        turns.append({"role": "user", "content": f"Say {count} more about Python."})
        turns.append({"role": "assistant", "content": " ".join(sentences[:count])})
        del sentences[:count]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def samples(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[list[int]]:
    """`count` samples of exactly `length` tokens from places drawn in a text; may overlap where it is short.

    Raises:
        ValueError: the text has fewer tokens than that.
    """
    rng = random.Random(f"samples/{length}/{seed}")
    found = []
    for _ in range(count):
        start = rng.randrange(max(1, len(text) - 8 * length))
        start = text.find(" ", start) + 1
        ids = tokenizer(text[start : start + 8 * length])["input_ids"][:length]
        if len(ids) < length:
            raise ValueError(f"a text of {len(text)} characters has no {length} tokens at {start}")
        found.append(ids)
    return found


def calibration_documents(kind: str, seed: int, given: dict[str, Path]) -> list[str]:
    """Documents of a kind of text, "docstrings" or "code" of the standard library or given by path; shuffled.

    Raises:
        ValueError: neither of these nor given.
    """
    rng = random.Random(f"calibration/{kind}/{seed}")
    if kind in given:
        text = read_text(given[kind])
        starts = range(0, max(1, len(text) - DOCUMENT // 2), DOCUMENT)
        documents = [text[start : start + DOCUMENT] for start in starts]
    elif kind == "docstrings":
        documents = list(_grouped(list(_docstrings("train")), rng))
    elif kind == "code":
        lines = text_lines("train", rng)
        documents = ["".join(next(lines) for _ in range(600)) for _ in range(200)]
    else:
        raise ValueError(
            f"kind of calibration text is {kind!r}, must be 'docstrings', 'code' or NAME=PATH"
        )
    rng.shuffle(documents)
    return documents


def _docstrings(split: Split) -> Iterator[str]:
    """Long docstrings of the standard library: English that is not in the language reference."""
    for path in source_files(split):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= SHORTEST_DOCSTRING:
                    yield text


def _grouped(texts: list[str], rng: random.Random) -> Iterator[str]:
    """Texts in random order, joined to documents."""
    rng.shuffle(texts)
    document = ""
    for text in texts:
        document += text + "\n\n"
        if len(document) >= DOCUMENT:
            yield document
            document = ""
