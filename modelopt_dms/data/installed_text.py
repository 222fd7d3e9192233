# SPDX-License-Identifier: Apache-2.0
"""English paragraphs and Python source that come with Python itself, in two parts.

One part is for calibration and training, the other for evaluation: all topics of the language reference, which are the
haystack of `evaluation.ruler`, and the modules that a hash of their name chooses, the same on every machine; among them
are those that `evaluation.text` holds out. Python versions differ a little in the text, which is under Python's licence
(PSF-2.0).
"""

import hashlib
import inspect
import os
import re
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

Part = Literal["calibration", "evaluation"]

EVALUATION_SHARE = 0.2
# Data tables, vendored packages and tests are Python by suffix only.
_FOLDERS = """
site-packages dist-packages encodings pydoc_data idlelib lib2to3 turtledemo test tests ensurepip
__pycache__
"""
EXCLUDED = frozenset(_FOLDERS.split())
_STRINGS = re.compile(r'^[ \t]*[rR]?"""(.*?)"""', re.DOTALL | re.MULTILINE)
_COMMENTS = re.compile(r"(?:^[ \t]*#[^\n]*\n)+", re.MULTILINE)
# A definition at the left margin, with its decorators and the comment in front of it.
_BORDER = re.compile(r"^(?=(?:@|def |class |async def |if |# ))", re.MULTILINE)
_MARKUP = re.compile(
    r"::=|>>>|\.\. |\|\||--+|[|{}\\<>=~^`]|https?:|\*\*|\+-|XXX|TODO|FIXME|Q\. |Args:|Returns:"
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def share_of(name: str) -> float:
    """A number in [0, 1) that only depends on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def part_of(name: str) -> Part:
    """The part that a text belongs to.

    Args:
        name: a module's path below the standard library, "json/decoder.py", or "topic:" and the name of a topic of
            `pydoc_data.topics`.
    """
    chosen = name.startswith("topic:") or share_of(name) < EVALUATION_SHARE
    return "evaluation" if chosen else "calibration"


def _modules() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        # In place, so that installed packages are not even listed.
        folders[:] = [x for x in folders if x not in EXCLUDED and not x.startswith("config-")]
        found += [Path(folder, x) for x in files if x.endswith(".py")]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


@cache
def python_source(part: Part) -> dict[str, str]:
    """Source of the standard library's modules of a part, by path below the library, sorted."""
    found = {}
    for name, path in _modules():
        if part_of(name) != part:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").expandtabs(4)
        if len(text) > 1000 and text.isascii() and max(map(len, text.splitlines())) < 160:
            found[name] = text
    return found


def definitions(source: str) -> list[str]:
    """A module cut in front of its functions and classes; joined, they are the module."""
    pieces: list[str] = []
    for piece in _BORDER.split(source):
        if pieces and not re.search(r"^(?:def |class |async def )", pieces[-1], re.MULTILINE):
            pieces[-1] += piece
        elif piece:
            pieces.append(piece)
    return pieces


@cache
def english(part: Part) -> dict[str, tuple[str, ...]]:
    """Paragraphs of plain English by source: topics of the language reference, docstrings and comments of modules."""
    found: dict[str, tuple[str, ...]] = {}
    if part == "evaluation":
        # Imported late: half a megabyte of text.
        from pydoc_data.topics import topics

        found = {f"topic:{x}": tuple(_paragraphs(topics[x])) for x in sorted(topics)}
    for name, source in python_source(part).items():
        texts = [inspect.cleandoc(x) for x in _STRINGS.findall(source)]
        texts += [re.sub(r"^[ \t]*#[ \t]?", "", x, flags=re.M) for x in _COMMENTS.findall(source)]
        # Docstrings of methods that do the same are often the same.
        found[name] = tuple(dict.fromkeys(x for text in texts for x in _paragraphs(text)))
    return {name: paragraphs for name, paragraphs in found.items() if paragraphs}


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph."""
    return _SENTENCE.split(paragraph)


def _paragraphs(text: str) -> list[str]:
    return [x for x in map(_plain, re.split(r"\n\s*\n", text)) if x]


def _plain(paragraph: str) -> str | None:
    """A paragraph with single spaces if it reads as English; else None."""
    text = " ".join(re.sub(r"(\w)-\n\s*(\w)", r"\1-\2", paragraph).split())
    if not 100 <= len(text) <= 1500 or not text[0].isupper() or text[-1] not in ".!?":
        return None
    if _MARKUP.search(text) or not text.isprintable() or not text.isascii():
        return None
    if re.search(r"Changed in|New in version|Added in|Copyright|Author", text):
        return None
    plain = sum(x.isalpha() or x == " " for x in text) / len(text)
    names = len(re.findall(r"_", text)) / len(text)
    return text if plain > 0.92 and names < 0.01 else None
