# SPDX-License-Identifier: Apache-2.0
"""The words, statements and phrases that the mix is made of, read from the files in `text/`.

words.txt       the words of a slot, one slot a line
statements.txt  a statement, then its questions, each with what answers it; a question has slots of the statement
hops.txt        two facts; a question that needs both; the answer, and its parts that stand in the facts
several.txt     a fact told several times with other values, its first slot the same; a question for all of them
tables.txt      the title of a table, its columns as "header: slot"; the first one names a row
phrases.json    what chats, questions and answers begin and end with; one that stands twice is drawn twice as often
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "text"


def read_lines(name: str) -> list[str]:
    """The lines of a text file."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def split(line: str) -> tuple[str, ...]:
    """The fields of a line, between bars."""
    return tuple(x.strip() for x in line.split(" | "))


POOLS = {name: tuple(words.split()) for name, words in (x.split(": ") for x in read_lines("words"))}
PHRASES: dict[str, list[str]] = json.loads((FOLDER / "phrases.json").read_text(encoding="utf-8"))
