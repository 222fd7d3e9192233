# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: a passage with every token as dark as it is remembered, and what each method found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_dms.config.output_dir import atomic_file

COLUMNS = 64
WIDTH, HEIGHT = 14.0, 6.2  # inches
TEXT = (0.025, 0.2, 0.6, 0.64)  # left, bottom, width, height, as shares of the picture
BARS = (0.75, 0.2, 0.225, 0.64)
# Width of a character of DejaVu Sans Mono, which comes with matplotlib, as a share of the font's size.
CHARACTER = 0.602


@dataclass(frozen=True)
class Passage:
    """Tokens of a text with the number of heads that still hold each.

    Attributes:
        tokens: as text, with the spaces in front of them.
        held: heads, out of `heads`, by token.
        heads: KV heads over all layers.
        fact: which of the tokens are asked about later.
    """

    tokens: Sequence[str]
    held: Sequence[int]
    heads: int
    fact: range


@dataclass(frozen=True)
class Placed:
    """A token at a line and column."""

    index: int
    line: int
    column: int
    text: str


def lay_out(tokens: Sequence[str], columns: int = COLUMNS) -> list[Placed]:
    """Tokens in lines of at most so many characters, broken in front of words."""
    words: list[list[int]] = []
    for i, token in enumerate(tokens):
        if not words or token[:1].isspace():
            words.append([])
        words[-1].append(i)
    placed, line, column = [], 0, 0
    for word in words:
        texts = [" ".join(tokens[i].splitlines()) or " " for i in word]
        if column + len("".join(texts)) > columns and column:
            line, column = line + 1, 0
        if column == 0:
            texts[0] = texts[0].lstrip()
        for i, text in zip(word, texts, strict=True):
            placed.append(Placed(i, line, column, text))
            column += len(text)
    return placed


def draw(
    path: Path,
    passage: Passage,
    found: Mapping[str, Mapping[str, int]],
    asked: Mapping[str, int],
    title: str,
    budget: str,
) -> None:
    """Write the PNG.

    Args:
        path: the file to write.
        passage: the text on the left.
        found: right answers by method and kind of question.
        asked: questions by kind.
        title: stands above everything.
        budget: what the methods may hold, in words.
    """
    # Imported late: it takes long.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT))
    FigureCanvasAgg(figure)
    figure.text(TEXT[0], 0.945, title, fontsize=15, weight="bold")
    _passage(figure, passage)
    _bars(figure.add_axes(BARS), found, asked)
    figure.text(BARS[0] - 0.085, 0.875, f"found; all but the first hold {budget}", fontsize=11)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _passage(figure: Any, passage: Passage) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    figure.text(
        TEXT[0],
        0.875,
        f"Each token, by how many of the {passage.heads} KV heads still hold it when the text has been read",
        fontsize=11,
    )
    axes = figure.add_axes(TEXT)
    axes.axis("off")
    placed = lay_out(passage.tokens)
    lines = max(placed[-1].line + 1, 8)
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(lines, 0)
    size = TEXT[2] * WIDTH * 72 / COLUMNS / CHARACTER
    # Few tokens are held by all heads; the darkest shade is for the most that the passage has.
    shades, scale = colormaps["YlGnBu"], Normalize(0, max(passage.held))
    for x in placed:
        shade = shades(scale(passage.held[x.index]))
        box = Rectangle((x.column, x.line + 0.06), len(x.text), 0.8, facecolor=shade, lw=0)
        axes.add_patch(box)
        dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.5
        axes.text(
            x.column,
            x.line + 0.47,
            x.text.replace("$", r"\$"),
            family="DejaVu Sans Mono",
            fontsize=size,
            color="white" if dark else "black",
            va="center_baseline",
        )
        if x.index in passage.fact:
            end = x.column + len(x.text)
            axes.plot([x.column, end], [x.line + 0.9] * 2, color="crimson", lw=2.2, clip_on=False)
    bar = figure.add_axes((TEXT[0], 0.11, 0.3, 0.035))
    figure.colorbar(ScalarMappable(scale, shades), cax=bar, orientation="horizontal")
    bar.set_xlabel("heads that hold the token", fontsize=10)
    figure.text(
        TEXT[0] + 0.33, 0.117, "red line: what is asked about later", color="crimson", fontsize=11
    )


def _bars(axes: Any, found: Mapping[str, Mapping[str, int]], asked: Mapping[str, int]) -> None:
    """Right answers of every method by kind of question, as shares with the counts written on them."""
    thick = 0.8 / len(asked)
    for k, (kind, count) in enumerate(asked.items()):
        for i, right in enumerate(found.values()):
            y = i + (k - (len(asked) - 1) / 2) * thick
            label = f"{kind}, of {count}" if i == 0 else None
            share = right[kind] / count
            color = ("#225ea8", "#7fcdbb")[k % 2]
            axes.barh(y, share, height=thick * 0.92, color=color, label=label)
            axes.text(share + 0.015, y, str(right[kind]), va="center", fontsize=10)
    axes.set_yticks(range(len(found)), list(found), fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.5, 1], ["none", "half", "all"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False, fontsize=10
    )
