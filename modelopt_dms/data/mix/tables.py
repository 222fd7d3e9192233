# SPDX-License-Identifier: Apache-2.0
"""Tables, lists and blocks of settings as facts: looking up, looking up in reverse, counting."""

import random

from modelopt_dms.data.mix.content import PHRASES, POOLS, read_lines, split
from modelopt_dms.data.mix.facts import Fact, Question
from modelopt_dms.data.mix.values import Draw

_TABLES = [
    (title, [x.split(": ") for x in columns.split(", ")])
    for title, columns in map(split, read_lines("tables"))
]


def table(rng: random.Random, taken: set[str]) -> list[Fact]:
    """A table of four to nine rows in one of six notations."""
    title, columns = rng.choice(_TABLES)
    title = _untaken(title, rng, taken)
    heads = [x[0] for x in columns]
    rows = []
    for _ in range(rng.randrange(4, 10)):
        draw = Draw(rng, taken)
        rows.append(
            [draw[slot] if i == 0 else draw[slot + "1"] for i, (_, slot) in enumerate(columns)]
        )
    text = rng.choice((_markdown, _csv, _bullets, _lines, _json, _aligned))(title, heads, rows)
    questions = []
    for row in rng.sample(rows, min(3, len(rows))):
        column = rng.randrange(1, len(heads))
        if rng.random() < 0.65:
            ask = rng.choice(PHRASES["ask_for_cell"]).format(
                title=title, head=heads[column], row=row[0], key=heads[0]
            )
            questions.append(_answer(rng, ask, row[column]))
        elif sum(x[column] == row[column] for x in rows) == 1:
            ask = rng.choice(PHRASES["ask_for_row"]).format(
                title=title, head=heads[column], value=row[column], key=heads[0]
            )
            questions.append(_answer(rng, ask, row[0]))
    ask = rng.choice(PHRASES["ask_for_count"]).format(title)
    questions.append(Question(ask, rng.choice(PHRASES["count_answers"]).format(len(rows))))
    names = tuple(x[0] for x in rows)
    ask = f'List every {heads[0]} of "{title}" in order.'
    questions.append(Question(ask, ", ".join(names), names))
    rng.shuffle(questions)
    return [Fact(text, tuple(questions), block=True)]


def _untaken(title: str, rng: random.Random, taken: set[str]) -> str:
    """A title that the document does not have yet, "Hosts of Krauldton"."""
    if title in taken or rng.random() < 0.3:
        title = f"{title} of {Draw(rng, taken)['name']}"
    taken.add(title)
    return title


def _answer(rng: random.Random, ask: str, value: str) -> Question:
    return Question(
        ask[0].upper() + ask[1:],
        rng.choice(PHRASES["cell_answers"]).format(value),
        (value,),
    )


def _markdown(title: str, heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(x)} |" for x in lines)


def _csv(title: str, heads: list[str], rows: list[list[str]]) -> str:
    return f"{title}:\n" + "\n".join(",".join(x) for x in [heads, *rows])


def _bullets(title: str, heads: list[str], rows: list[list[str]]) -> str:
    lines = (", ".join(f"{h} {v}" for h, v in zip(heads[1:], x[1:], strict=True)) for x in rows)
    return f"{title}:\n" + "\n".join(f"- {x[0]}: {y}" for x, y in zip(rows, lines, strict=True))


def _lines(title: str, heads: list[str], rows: list[list[str]]) -> str:
    blocks = ("\n".join(f"{h} = {v}" for h, v in zip(heads, x, strict=True)) for x in rows)
    return f"# {title}\n" + "\n\n".join(blocks)


def _json(title: str, heads: list[str], rows: list[list[str]]) -> str:
    lines = (", ".join(f'"{h}": "{v}"' for h, v in zip(heads, x, strict=True)) for x in rows)
    return f'"{title}": [\n' + ",\n".join(f"  {{{x}}}" for x in lines) + "\n]"


def _aligned(title: str, heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, x)) + 2 for x in zip(heads, *rows, strict=True)]
    lines = (
        "".join(v.ljust(w) for v, w in zip(x, widths, strict=True)).rstrip() for x in [heads, *rows]
    )
    return f"{title}\n" + "\n".join(lines)


def word_list(rng: random.Random, taken: set[str]) -> list[Fact]:
    """A numbered list of words: by number, what comes before and after, all of them."""
    pool = rng.choice([x for x in POOLS if len(POOLS[x]) > 25 and x not in ("key", "variable")])
    words = [Draw(rng, taken)[pool] for _ in range(rng.randrange(5, 11))]
    title = _untaken(rng.choice(PHRASES["list_titles"]), rng, taken)
    lines = "\n".join(f"{i}. {x}" for i, x in enumerate(words, 1))
    at = rng.randrange(1, len(words))
    questions = [
        _answer(rng, f'What is number {at + 1} of "{title}"?', words[at]),
        _answer(rng, f'In "{title}", what comes right after {words[at - 1]}?', words[at]),
        Question(f'How many things are on the list "{title}"?', str(len(words))),
        Question(f'Repeat "{title}".', lines, tuple(words)),
    ]
    rng.shuffle(questions)
    return [Fact(f"{title}:\n{lines}", tuple(questions), block=True)]
