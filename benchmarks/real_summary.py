# SPDX-License-Identifier: Apache-2.0
"""Rows of real_models.py as a table in markdown and as a picture. Measures nothing."""

import math
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

FIDELITY = "fidelity"
OTHERS_OF = ("kvpress", "transformers")  # whose methods are not ours
SETTING = ("dtype", "length", "ratio")


def group_of(method: str) -> str:
    """What draws of one recipe have in common: "calibrated_cr4@code-1" is of "calibrated_cr4"."""
    return method.partition("@")[0]


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, spread = right / asked, z * z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / asked + spread / asked / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def together(rows: list[Row]) -> dict[tuple[Any, ...], dict[tuple[str, str], list[Row]]]:
    """Rows of all draws by setting and group, then by task and category."""
    found: dict[tuple[Any, ...], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if "error" in row:
            continue
        setting = (*(row[x] for x in SETTING), group_of(row["method"]))
        about = (row["task"], row["category"] or "")
        found.setdefault(setting, {}).setdefault(about, []).append(row)
    return found


def markdown(rows: list[Row]) -> str:
    """One line a setting and group: shares with mean, worst draw and interval; KL with mean and worst draw."""
    tables = together(rows)
    columns = sorted({about for cells in tables.values() for about in cells}, key=_order)
    head = ["dtype", "tokens", "CR asked", "method", "draws", "CR on the text"]
    head += [f"KL {category}" if task == FIDELITY else task for task, category in columns]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for setting in sorted(
        tables, key=lambda x: (x[0], x[1], x[2], x[3].startswith(OTHERS_OF), x[3])
    ):
        cells = tables[setting]
        dtype, length, ratio, group = setting
        every = [row for found in cells.values() for row in found]
        draws = len({row["method"] for row in every})
        # Of presses it is the context's: they keep all that follows.
        kinds = ("compression_ratio", "context_compression_ratio", "bytes_ratio")
        ratios = [x for row in every if (x := next((row[y] for y in kinds if y in row), None))]
        span = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        values = [_cell(cells.get(column, [])) for column in columns]
        line = [dtype, str(length), f"{ratio:g}", group, str(draws), span, *values]
        lines.append(f"| {' | '.join(line)} |")
    worst = [row["error"] for row in rows if "error" in row]
    lines += ["", *(f"* {message}" for message in sorted(set(worst)))]
    lines.append(
        "Shares: right of asked over all draws, [95 % Wilson interval], worst draw. KL: mean over all tokens "
        "(99th percentile), worst draw's mean; and after `;`, all that presses have, over the last tokens of a sample."
    )
    return "\n".join(lines)


def _order(about: tuple[str, str]) -> tuple[bool, str, str]:
    return about[0] == FIDELITY, *about


def _cell(rows: list[Row]) -> str:
    if not rows:
        return ""
    if "asked" in rows[0]:
        right, asked = sum(x["right"] for x in rows), sum(x["asked"] for x in rows)
        low, high = wilson(right, asked)
        worst = min(rows, key=lambda x: x["right"])
        shown = f"{right} / {asked} [{100 * low:.0f} to {100 * high:.0f} %]"
        return shown if len(rows) == 1 else f"{shown}, {worst['right']} / {worst['asked']}"

    def mean(name: str) -> float:
        return sum(x[name] for x in rows) / len(rows)

    tail = f"{mean('tail_kl'):.4f}"
    if "kl" not in rows[0]:
        return tail
    worst_kl = "" if len(rows) == 1 else f", {max(x['kl'] for x in rows):.4f}"
    return f"{mean('kl'):.4f} ({mean('kl_p99'):.2f}){worst_kl}; {tail}"


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Needles and KL of prose over the ratio, a column for each length and dtype; draws as a band."""
    rows = [x for x in content["rows"] if "error" not in x and x["ratio"] > 1]
    places = sorted({(x["length"], x["dtype"]) for x in rows}) or [(0, "")]
    figure.set_size_inches(max(9, 4 * len(places)), 8)
    axes = figure.subplots(2, len(places), squeeze=False)
    groups = sorted({group_of(x["method"]) for x in rows})
    colors = {group: f"C{i}" for i, group in enumerate(groups)}
    for column, (length, dtype) in enumerate(places):
        here = [x for x in rows if (x["length"], x["dtype"]) == (length, dtype)]
        above, below = axes[0][column], axes[1][column]
        needles = [x for x in here if x["task"] == "needle"]
        _curves(above, colors, needles, lambda x: 100 * x["right"] / x["asked"])
        prose = [x for x in here if x["task"] == FIDELITY and x["category"] == "prose"]
        _curves(below, colors, prose, lambda x: max(x["tail_kl"], 1e-6))
        above.set_title(f"{length} tokens, {dtype}")
        above.set_ylabel("needles found, %")
        above.set_ylim(-3, 103)
        below.set_ylabel("KL from the full cache, prose, last tokens, nats")
        below.set_yscale("log")
        for one in (above, below):
            one.set_xlabel("compression ratio asked for")
            one.set_xscale("log", base=2)
            one.set_xticks(sorted({x["ratio"] for x in here}))
            one.xaxis.set_major_formatter("{x:g}")
    if axes[0][0].lines:
        axes[0][0].legend(fontsize=7)


def _curves(
    axes: Any, colors: dict[str, str], rows: list[Row], value: Callable[[Row], float]
) -> None:
    """A line for each group: the mean of its draws, and a band from the least to the most where there are several."""
    for group in sorted({group_of(x["method"]) for x in rows}):
        own = [x for x in rows if group_of(x["method"]) == group]
        ratios = sorted({x["ratio"] for x in own})
        values = [[value(x) for x in own if x["ratio"] == ratio] for ratio in ratios]
        means = [sum(x) / len(x) for x in values]
        if group.startswith(OTHERS_OF):
            axes.plot(ratios, means, ".--", label=group, color=colors[group], linewidth=1)
            continue
        (line,) = axes.plot(ratios, means, "o-", label=group, color=colors[group], linewidth=2)
        axes.fill_between(
            ratios,
            [min(x) for x in values],
            [max(x) for x in values],
            alpha=0.2,
            color=line.get_color(),
        )
