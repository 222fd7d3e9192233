# SPDX-License-Identifier: Apache-2.0
"""The command report: one HTML page that shows what a model forgets, and what that buys."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt_dms.cli.opening import (
    beyond_model,
    check_compressed,
    check_ratio,
    load_any,
    set_ratio,
)
from modelopt_dms.cli.options import (
    DeviceOpt,
    Dtype,
    DtypeOpt,
    RatioOpt,
    TrustOpt,
    check_json,
    err,
    show,
    warn,
)
from modelopt_dms.config.section import LONGEST as MOST
from modelopt_dms.evaluation.report_page import PAGE
from modelopt_dms.serving.planner.hardware import gpu_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelopt_dms.evaluation.report_page.build import Origin, ReportPlan

SHORTEST = 256  # has room for the facts
GPU = "h200"
RATIOS = "2,4,8"
LONGEST = 2048  # by default: curves may be of longer texts, which take long on a CPU

TextOpt = Annotated[
    Path | None,
    typer.Option(help="Text file whose start is shown. By default, text with facts, made here."),
]
LengthOpt = Annotated[
    int | None,
    typer.Option(
        min=SHORTEST,
        max=MOST,
        help=f"Tokens of the text and of prompts. By default the curve's, at most {LONGEST}.",
    ),
]
CountOpt = Annotated[
    int, typer.Option(min=0, help="Prompts of each of two tasks; 0 leaves accuracy and KL out.")
]


def report(
    model: Annotated[Path, typer.Argument(help="Directory of a compressed model.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The HTML file; one of ours is replaced.")
    ] = Path(PAGE),
    text: TextOpt = None,
    length: LengthOpt = None,
    count: CountOpt = 4,
    ratios: Annotated[
        str, typer.Option(help="Compression ratios of these, comma-separated, within the curve.")
    ] = RATIOS,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens written to compare memory and time; 0 leaves it out.")
    ] = 128,
    minutes: Annotated[
        float, typer.Option(min=0.0, help="No new prompt is asked after so many minutes.")
    ] = 10.0,
    peers: Annotated[
        Path | None,
        typer.Option(help="Results of benchmarks/real_models.py, whose other methods are shown."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and texts.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures here; '-' prints them.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="Sequences that fit on it: h200, h100, b200, a100 or l40s.")
    ] = GPU,
    cr: RatioOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Write one HTML page: what the model forgot of a text, where, and what it still answers beside a full cache."""
    from modelopt_dms.evaluation.report_page.render import check_drawable, check_page, write_page

    check_drawable()
    check_page(output)
    check_json(json_file)
    gpu_of(gpu)
    wanted = _ratios(ratios)
    words = None if text is None else _read_text(text)
    others = [] if peers is None else read_peers(peers)
    place = check_compressed(model)
    check_ratio(place, cr)
    from modelopt_dms.evaluation.report_page.build import Origin, ReportPlan
    from modelopt_dms.evaluation.report_page.tradeoff import reachable

    network, tokenizer = load_any(str(place), dtype, device, trust_remote_code)
    network.eval()
    size = _length(network, length)
    warn(beyond_model(str(place), size, "--length"))
    check_evicts(network, model, size)
    set_ratio(network, cr)
    if count and ratios != RATIOS:
        found, left_out = reachable(network, wanted, size)
        if found == [None]:
            raise ValueError(f"--ratios {ratios}: none can be shown. {' '.join(left_out)}")
    plan = ReportPlan(
        length=size, questions=5, prompts=count, ratios=wanted, new_tokens=new_tokens, minutes=minutes,
        seed=seed,
    )  # fmt: skip
    origin = Origin(_name(model), f"modelopt-dms {shlex.join(sys.argv[1:])}", peers=others)
    origin = replace(origin, **written_beside(place))
    if text is not None and words is not None:
        origin = replace(origin, text=(text.name, _ids(tokenizer, words, size, text)))
    figures = measure(network, tokenizer, plan, origin)
    add_capacity(figures, place, gpu)
    write_page(output, figures)
    show(figures, json_file, f"report: {output.absolute()}")


def report_after_compress(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", directory: Path
) -> str | None:
    """A brief report beside the model that `compress` saved, and where it is.

    What prevents it is a warning, as the model is there.
    """
    from modelopt_dms.evaluation.report_page.build import BRIEF, Origin
    from modelopt_dms.evaluation.report_page.render import write_page

    place = directory / PAGE
    command = shlex.join(["modelopt-dms", "report", str(directory), "-o", PAGE])
    try:
        size = _length(model, None)
        check_evicts(model, directory, size)
        origin = Origin(_name(directory), command, **written_beside(directory))
        figures = measure(model, tokenizer, replace(BRIEF, length=size), origin, quiet=True)
        add_capacity(figures, directory, GPU)
        write_page(place, figures)
    except Exception as error:  # whatever it is, the model is saved
        warn(f"no report was written: {type(error).__name__}: {error}")
        return None
    return f"report: {place} (in full: {command})"


def measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plan: "ReportPlan",
    origin: "Origin",
    quiet: bool = False,
) -> dict[str, Any]:
    """What the page shows, with a bar and the time that is left; says first what it will do."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from modelopt_dms.evaluation.report_page.build import build, cost, describe
    from modelopt_dms.evaluation.report_page.tradeoff import reachable

    settings, left_out = reachable(model, plan.ratios, plan.length)
    if not quiet:
        for line in left_out if plan.prompts else ():
            warn(line)
        err.print(f"measures {describe(plan, settings)}", highlight=False, soft_wrap=True)
    columns = (TextColumn("report"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("report", total=cost(plan, len(settings)))
        advance: Callable[[float], None] = lambda x: bar.advance(task, x)  # noqa: E731
        return build(model, tokenizer, plan, origin, advance)


def add_capacity(figures: dict[str, Any], directory: Path, gpu: str) -> None:
    """Put in the sequences that fit a GPU at the ratio that was measured, or a note that says why not."""
    from modelopt_dms.serving.planner.measured import capacity
    from modelopt_dms.serving.planner.model_shape import PlanError

    held = figures["cache"]
    try:
        figures["capacity"] = capacity(
            directory, gpu, held["compression_ratio"], round(held["context_tokens"])
        )
    except PlanError as error:
        figures["notes"].append(f"No sequences that fit a GPU: {error}.")


def check_evicts(model: "PreTrainedModel", directory: Path, length: int) -> None:
    """Refuse a model that forgets nothing.

    Raises:
        ValueError: no gates, eviction is off, or the text fits into what is always held.
    """
    from modelopt_dms.gates.gate import gates

    found = gates(model)
    if not found:
        raise ValueError(f"{directory} is a plain model, without gates; compress it first")
    if not all(gate.enabled for gate in found):
        raise ValueError(f"eviction is switched off in {directory}: it forgets nothing")
    always = found[0].window + 1 + found[0].protect_first
    if length <= always:
        raise ValueError(
            f"length={length}: the model always holds {always} tokens, so nothing would be forgotten; choose more"
        )


def read_peers(path: Path) -> list[dict[str, Any]]:
    """Rows of other methods in a results file of benchmarks/real_models.py, for a table; those that mask are marked.

    Raises:
        ValueError: it is no such file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [
            {
                "method": x["method"] + ("" if x.get("frees", True) else " (masks, frees nothing)"),
                "task": x["task"] if x["category"] is None else f"KL, {x['category']}",
                "length": x["length"],
                "ratio": x["ratio"],
                "result": f"{x['right']} of {x['asked']}"
                if "right" in x
                else f"{x['tail_kl']:.3f}",
            }
            for x in rows
            if x["method"].startswith(("kvpress", "transformers")) and "error" not in x
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'--peers {path} is no results file of benchmarks/real_models.py, which has an object with "rows"'
        ) from error


def written_beside(directory: Path) -> dict[str, Any]:
    """Recipe and summary that `compress` left in a directory, as far as they are there."""
    found: dict[str, Any] = {}
    recipe, summary = directory / "dms_recipe.yaml", directory / "dms_summary.json"
    if recipe.is_file():
        found["recipe"] = recipe.read_text(encoding="utf-8")
    if summary.is_file():
        stages = json.loads(summary.read_text(encoding="utf-8"))
        shown = ("sequence_length", "compression_ratio", "target_cr", "kl")
        found["summary"] = {stage: {name: x[name] for name in shown} for stage, x in stages.items()}
    return found


def _name(directory: Path) -> str:
    return directory.resolve().name


def _ratios(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(x) for x in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(1 < x < 1000 for x in found):
        raise ValueError(
            f"--ratios: {text!r} must be numbers above 1, comma-separated, such as 2,4,8"
        )
    return tuple(dict.fromkeys(found))


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--text {path} does not exist or is not a file")
    try:
        words = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is no UTF-8 text ({error.reason})") from None
    if not words.strip():
        raise ValueError(f"--text {path} is empty")
    return words


def _ids(tokenizer: Any, words: str, length: int, path: Path) -> list[int]:
    # No more characters than so many tokens of any tokenizer have.
    ids = list(tokenizer(words[: 64 * length], verbose=False)["input_ids"])[:length]
    if len(ids) < SHORTEST:
        raise ValueError(f"--text {path} has {len(ids)} tokens, must have at least {SHORTEST}")
    return ids


def _length(model: Any, length: int | None) -> int:
    """Tokens of a text: what was asked for, or those of the curve, within bounds."""
    if length is not None:
        return length
    curve = getattr(model.config, "dms_curve", None)
    return 1024 if curve is None else min(max(SHORTEST, curve["length"]), LONGEST)
