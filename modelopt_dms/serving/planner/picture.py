# SPDX-License-Identifier: Apache-2.0
"""A plan as a picture: sequences that fit, and tokens per second, by number of GPUs."""

from pathlib import Path
from typing import Any

from modelopt_dms.config.output_dir import atomic_file
from modelopt_dms.serving.planner.capacity import Plan, PlanRow

_DENSE, _DMS = ("#c4c4c4", "#8a8a8a"), ("#a8d84e", "#76b900", "#4c8c00", "#2b5d00")


def draw(found: Plan, target: Path) -> None:
    """Draw a plan into a .svg or .png file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(x.variant for x in found.rows))
    counts = list(dict.fromkeys(x.tp for x in found.rows))
    _bars(left, found.rows, names, counts, "sequences")
    _bars(right, found.rows, names, counts, "tokens_per_second")
    left.set_title("sequences that fit at once")
    right.set_title("tokens per second, at most")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.suptitle(
        f"{found.model} on {found.gpu}, {found.context:,} tokens a sequence, {found.recipe}\n"
        "a model of memory and bandwidth, not a measurement",
        fontsize=10,
    )
    with atomic_file(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:], dpi=150)


def _bars(
    axes: Any, rows: tuple[PlanRow, ...], names: list[str], counts: list[int], figure: str
) -> None:
    width = 0.8 / len(names)
    colors = {x: iter(_DENSE if x else _DMS) for x in (True, False)}
    values = {(x.variant, x.tp): getattr(x, figure) for x in rows}
    for i, name in enumerate(names):
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(counts))]
        heights = [values[name, count] for count in counts]
        bars = axes.bar(
            places, heights, width, label=name, color=next(colors[name.startswith("dense")])
        )
        axes.bar_label(bars, [f"{x:,.0f}" for x in heights], fontsize=6, rotation=90, padding=2)
    axes.set_xticks(range(len(counts)), [f"{x} GPU{'s' if x > 1 else ''}" for x in counts])
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
