# SPDX-License-Identifier: Apache-2.0
"""The command eval: tasks, perplexity and fidelity of a model through its physical KV cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt_dms.cli.boards import Board, board, board_tasks
from modelopt_dms.cli.interrupting import when_interrupted
from modelopt_dms.cli.opening import (
    beyond_model,
    check_device,
    check_gates,
    check_model,
    check_ratio,
    load_any,
    no_gates,
    open_files,
    set_ratio,
)
from modelopt_dms.cli.options import (
    STDOUT,
    DataOpt,
    DeviceOpt,
    DirArg,
    Dtype,
    DtypeOpt,
    FormatOpt,
    RatioOpt,
    TrustOpt,
    check_json,
    err,
    out,
    show,
    warn,
)
from modelopt_dms.cli.tables import print_table
from modelopt_dms.config.section import LONGEST
from modelopt_dms.evaluation.limits import broken, parse_limits
from modelopt_dms.evaluation.names import CATEGORIES, DEFAULT, EVALUATIONS, check_tasks

if TYPE_CHECKING:
    from modelopt_dms.evaluation.resume import RowStore
    from modelopt_dms.evaluation.run import Asked, Unit

# The exit code when results break a limit; 1 and 2 are errors.
FAILED = 3

TasksOpt = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(EVALUATIONS)}; comma-separated. The first {len(DEFAULT)}, unless --data or --fidelity is "
        "given."
    ),
]
FidelityOpt = Annotated[
    bool,
    typer.Option(
        "--fidelity",
        help="KL from the full cache and agreement, by category of text: each --data file, or the package's.",
    ),
]
KvpressOpt = Annotated[
    Path | None,
    typer.Option(
        help="Also write the results below this directory as kvpress' evaluation does; RULER's families only, all "
        "answers generated."
    ),
]
KvpressDataOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[/PART]=FILE",
        help="With --kvpress: a data set with kvpress' columns, .parquet or .jsonl, e.g. ruler/4096=test.parquet.",
    ),
]
KvpressModelOpt = Annotated[
    str | None,
    typer.Option(
        help="With --kvpress: the model's name there, e.g. Qwen/Qwen3-8B. By default that of the directory."
    ),
]
LimitsOpt = Annotated[
    list[str] | None,
    typer.Option(
        help="Exit with 3 if a result breaks this, e.g. 'kl>0.05', 'prose.top1<0.97', 'needle.accuracy<0.9'."
    ),
]


def evaluate(
    model: DirArg,
    data: DataOpt = None,
    data_format: FormatOpt = None,
    tasks: TasksOpt = None,
    fidelity: FidelityOpt = False,
    fail_if: LimitsOpt = None,
    lengths: Annotated[
        str, typer.Option(help="Context lengths in tokens, comma-separated.")
    ] = "512,1024,2048",
    count: Annotated[int, typer.Option(min=1, help="Samples per task and length.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Also write the rows here; until all are there, FILE.partial. '-' prints them at the end, and no "
            "table.",
        ),
    ] = None,
    kvpress: KvpressOpt = None,
    kvpress_data: KvpressDataOpt = None,
    kvpress_model: KvpressModelOpt = None,
    cr: RatioOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Score a model through its physical KV cache; an interrupted run goes on where it stopped (--json)."""
    wanted = check_tasks(tasks.split(",")) if tasks is not None else ()
    place = check_model(model)
    kvpress_board = board(kvpress, kvpress_data, kvpress_model, place)
    if kvpress_board is not None:
        wanted = board_tasks(wanted, kvpress_board)
    elif not (wanted or data or fidelity):
        wanted = DEFAULT
    of_file = kvpress_board is not None and kvpress_board.data is not None
    # Which tasks a file has is not known before it is read.
    measured = None if of_file else _measured(wanted, data or [], fidelity)
    limits = parse_limits(fail_if or [], fidelity, measured)
    sizes = list(dict.fromkeys(_length(x) for x in lengths.split(",")))
    if not of_file:
        warn(beyond_model(place, max(sizes), "--lengths"))
    check_ratio(place, cr)
    if fidelity:
        check_gates(model, place, "--fidelity")
    check_device(device)
    open_files(data or [], "--data", data_format)
    check_json(json_file)
    from modelopt_dms.evaluation.resume import RowStore

    store = RowStore(
        None if json_file == STDOUT else json_file,
        _files_of(place, data or [], kvpress_board)
        | {"format": data_format, "cr": cr, "dtype": dtype.value, "seed": seed, "count": count},
    )
    when_interrupted(store.how_to_go_on)
    from modelopt_dms.evaluation.run import Asked, task_units
    from modelopt_dms.gates.gate import gates

    network, tokenizer = load_any(place, dtype, device, trust_remote_code)
    set_ratio(network, cr)
    asked = Asked(network.eval(), tokenizer, sizes, count, seed)
    if fidelity and not gates(network):
        raise no_gates(model, "--fidelity")
    units = _text_units(asked, data or [], data_format, fidelity)
    units += (
        task_units(asked, wanted) if kvpress_board is None else kvpress_board.units(asked, wanted)
    )
    rows = _measure(units, store)
    finished = store.finish(rows)
    if kvpress_board is not None:
        # Of --json -, standard output is for the rows.
        said = err if json_file == STDOUT else out
        for folder in kvpress_board.write(asked, rows, cr):
            said.print(f"kvpress: {folder}", markup=False, highlight=False, soft_wrap=True)
    _show(finished, json_file)
    _warn_of_ratio(network, rows, cr)
    _warn_of_few(rows, count)
    if lines := broken(limits, rows):
        for line in lines:
            err.print(f"[bold red]failed:[/bold red] {line}", highlight=False, soft_wrap=True)
        raise typer.Exit(FAILED)


def _text_units(
    asked: "Asked", data: list[Path], data_format: str | None, fidelity: bool
) -> "list[Unit]":
    """What is measured of a user's files, or with fidelity of built-in texts."""
    from modelopt_dms.evaluation.run import fidelity_units, file_units

    if fidelity:
        return fidelity_units(asked, data, data_format)
    return file_units(asked, data, data_format) if data else []


def _files_of(place: str, data: list[Path], kvpress: Board | None) -> dict[str, Any]:
    """What tells whether a run is of the same files as an earlier one."""
    from modelopt_dms.evaluation.resume import identity

    found: dict[str, Any] = {"model": identity(place), "data": [identity(x) for x in data]}
    if kvpress is not None:
        found["kvpress"] = kvpress.data and [kvpress.data[0], identity(kvpress.data[1])]
    return found


def _warn_of_few(rows: list[dict[str, Any]], count: int) -> None:
    """Say where there was too little text for the samples that were asked for, and which files were of no use."""
    for row in rows:
        for name, why in row.get("unused", {}).items():
            warn(f"data at {row['length']} tokens: no sample is of {name}: {why}")
        if (samples := row.get("samples", count)) < count:
            where = row.get("category") or row["task"]
            warn(f"{where} at {row['length']} tokens: {samples} samples, as there is no more text")


def _measured(tasks: "tuple[str, ...]", data: list[Path], fidelity: bool) -> tuple[str, ...]:
    """Tasks and categories of text that a run has results of."""
    if not fidelity:
        return (*tasks, *(["data"] if data else []))
    return (*tasks, "fidelity", *((x.stem for x in data) if data else CATEGORIES))


def _measure(units: "list[Unit]", store: "RowStore") -> list[dict[str, Any]]:
    """All rows, with a bar and the time that is left; says how many an interrupted run has left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if store.rows:
        out.print(f"there already, of {len(units)} results: {store.counted()}", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    rows = []
    with Progress(*columns, console=err, transient=True) as bar:
        left = [unit for unit in units if not store.has(unit.key)]
        task = bar.add_task("eval", total=sum(unit.key["length"] for unit in left))
        for unit in units:
            name, length = unit.key.get("category") or unit.key["task"], unit.key["length"]
            bar.update(task, description=f"{name}, {length} tokens")

            def advance(share: float, length: int = length) -> None:
                bar.advance(task, share * length)

            rows.append(store.in_parts(unit.key, unit.parts, unit.join, advance))
    return rows


def _show(rows: list[dict[str, Any]], json_file: Path | None) -> None:
    """Tables; or the rows, for `--json -`. The store has written any other file."""
    from modelopt_dms.evaluation.limits import FIDELITY
    from modelopt_dms.evaluation.report import fidelity_table, results_table

    if json_file == STDOUT:
        show(rows, json_file)
        return
    distances = [row for row in rows if row["task"] == FIDELITY]
    if distances:
        print_table(out, fidelity_table(distances))
    if others := [row for row in rows if row["task"] != FIDELITY]:
        print_table(out, results_table(others))


def _warn_of_ratio(network: Any, rows: list[dict[str, Any]], cr: float | None) -> None:
    """One warning if texts got another ratio than was asked for."""
    from modelopt_dms.gates.thresholds import ratio_warning

    found = (
        ratio_warning(network, row["compression_ratio"], int(row["context_tokens"]), cr)
        for row in rows
    )
    # One is enough: the table shows the others.
    warn(next((line for line in found if line is not None), None))


def _length(text: str) -> int:
    digits = text.strip()
    # More digits than the longest has are not converted: Python refuses thousands of them with an error of its own.
    small = digits.isdecimal() and len(digits) <= 12
    if not small or not 64 <= int(digits) <= LONGEST:
        raise ValueError(
            f"--lengths: {digits!r} must be a whole number of at least 64 tokens, and at most {LONGEST:,}"
        )
    return int(digits)
