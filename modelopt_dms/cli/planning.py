# SPDX-License-Identifier: Apache-2.0
"""The command that says what would fit where: plan. Imports neither torch nor transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from modelopt_dms.cli.options import JsonOpt, check_json, show
from modelopt_dms.config.output_dir import check_results_file

if TYPE_CHECKING:
    from modelopt_dms.serving.planner.capacity import Plan, PlanRow


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="config.json, a model's directory (a compressed one's own ratio is taken), .gguf file, a name such as "
            "Qwen3-8B or smollm2, or a hub id in the local cache."
        ),
    ],
    gpu: Annotated[str, typer.Option(help="h200, h100, b200, a100 or l40s.")] = "h200",
    context: Annotated[
        str, typer.Option(help="Tokens of every sequence, prompt and answer: 32768 or 32k.")
    ] = "32k",
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="Name or YAML file. [default: calibrated_cr8, or the compressed model's own]",
        ),
    ] = None,
    tp: Annotated[
        str | None,
        typer.Option(
            help="Numbers of GPUs that share the model, comma-separated. [default: of 1, 2, 4 and 8, "
            "those that share its heads evenly]"
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences at a time. [default: as many as fit]")
    ] = None,
    memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory for weights and KV caches.")
    ] = 0.9,
    json_file: JsonOpt = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw them: a .svg or .png file.")
    ] = None,
) -> None:
    """Say how many sequences fit on GPUs and how fast they decode at best: a model, not a measurement."""
    from modelopt_dms.serving.planner.capacity import plan as make

    check_json(json_file)
    place = Path(model)
    if not model.strip() or (place.is_file() and place.suffix.lower() not in (".json", ".gguf")):
        raise ValueError(
            f"MODEL {model!r} is no model; accepted: a config.json, a model's directory, a .gguf file, a name such as "
            "Qwen3-8B or smollm2, or a hub id in the local cache"
        )
    if picture is not None:
        if picture.suffix not in (".svg", ".png"):
            raise ValueError(f"--picture {picture} must end in .svg or .png")
        check_results_file(picture)
    found = make(
        model,
        gpu,
        _tokens(context),
        recipe,
        tp=None if tp is None else _counts(tp),
        batch=batch,
        memory_utilization=memory_utilization,
    )
    lines = [x for x in (found.ratios, found.note) if x]
    if any(x.variant.endswith("*") for x in found.rows):
        lines.append(f"*: the number format that the KV cache is stored in ({found.recipe})")
    show(found.as_dict(), json_file, _table(found), *lines)
    if picture is not None:
        from modelopt_dms.serving.planner.picture import draw

        draw(found, picture)


def _tokens(text: str) -> int:
    """32768, 32k, or 1m."""
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text if factor == 1 else text[:-1]
    if not digits.isdigit():
        raise ValueError(f"--context {text!r} must be a number of tokens, for example 32768 or 32k")
    return int(digits) * factor


def _counts(text: str) -> list[int]:
    parts = [x.strip() for x in text.split(",")]
    if not all(x.isdigit() for x in parts):
        raise ValueError(f"--tp {text!r} must be numbers of GPUs, for example 1,2,4,8")
    return [int(x) for x in parts]


def _table(found: "Plan") -> Table:
    title = (
        f"{found.model} ({found.parameters / 1e9:.2f}B parameters) on {found.gpu}, "
        f"{found.context:,} tokens a sequence, {found.recipe}"
    )
    table = Table(
        title=title,
        title_justify="left",
        padding=(0, 0, 0, 1),
        caption="weights and KV of a sequence: on one GPU; CR: context over resident tokens; fit: sequences at once; "
        "step: of one token for each of them; gain: tokens/s over dense",
        caption_justify="left",
    )
    table.add_column("GPUs", justify="right", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for name in ("weights\nGB", "KV\nMB", "CR", "fit", "step\nms", "tokens/s", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in found.rows:
        if previous not in (None, row.tp):
            table.add_section()
        table.add_row("" if row.tp == previous else str(row.tp), *_cells(row))
        previous = row.tp
    return table


def _cells(row: "PlanRow") -> list[str]:
    speed = ["-", "-", "-"]
    if row.step_ms is not None:
        times = "" if row.times_dense is None else f"{row.times_dense:.2f}x"
        speed = [f"{row.step_ms:.1f}", f"{row.tokens_per_second:,.0f}", times]
    return [
        row.variant,
        f"{row.weight_bytes / 1e9:.1f}",
        f"{row.kv_bytes / 1e6:,.1f}",
        f"{row.compression_ratio:.1f}",
        str(row.sequences),
        *speed,
    ]
