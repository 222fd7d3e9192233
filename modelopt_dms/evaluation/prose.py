# SPDX-License-Identifier: Apache-2.0
"""English sentences: of Python's language reference, which every machine has, or of a text file."""

import re
from functools import cache
from pathlib import Path

from modelopt_dms.data.installed_text import sentences

# What the reference has beside prose: headings, grammar, tables, code, names in quotes, lists of changes.
_MARKUP = re.compile(r"""::=|\+-|[|"*\[\]{}\\_=<>]|--|Changed in|New in|Added in""")
_LENGTHS = range(40, 400)


@cache
def reference_sentences() -> tuple[str, ...]:
    """About 900 sentences, 20,000 tokens, of Python's language reference; versions of Python differ a little."""
    # Imported late: half a megabyte of text.
    from pydoc_data.topics import topics

    paragraphs = (
        paragraph for name in sorted(topics) for paragraph in re.split(r"\n\s*\n", topics[name])
    )
    return tuple(
        sentence
        for paragraph in paragraphs
        for sentence in split_sentences(paragraph)
        if len(sentence) in _LENGTHS
        and sentence[0].isupper()
        and sentence.endswith(".")
        and not _MARKUP.search(sentence)
    )


def read_sentences(path: Path) -> tuple[str, ...]:
    """The sentences of a text file, or of all .txt files of a directory in the order of their names.

    Raises:
        ValueError: there are none.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    found = tuple(sentence for text in texts for sentence in split_sentences(text))
    if not found:
        raise ValueError(f"{path} has no text; give a text file or a directory of .txt files")
    return found


def split_sentences(text: str) -> list[str]:
    """Sentences with single spaces between their words."""
    return [x for x in sentences(" ".join(text.split())) if x]
