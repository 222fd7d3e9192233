# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several commands share, and where commands print."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from modelopt_dms.checkpoints.base import EMBEDDED
from modelopt_dms.checkpoints.fetch import KNOWN
from modelopt_dms.cli.tables import print_table
from modelopt_dms.config.output_dir import check_results_file, write_json
from modelopt_dms.config.section import LARGEST_INTEGER, LONGEST
from modelopt_dms.data.formats import FORMATS

# As a file for results.
STDOUT = Path("-")
out, err = Console(), Console(stderr=True)


def say(text: str) -> None:
    """Print a line as it is: a terminal may wrap it, a pipe gets it whole."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def show(figures: Any, json_file: Path | None, *tables: Any) -> None:
    """Print tables, or, for `--json -`, their figures as JSON; to another file write these as well."""
    if json_file == STDOUT:
        print(json.dumps(figures, indent=2))
        return
    if json_file is not None:
        write_json(json_file, figures)
    for table in tables:
        if isinstance(table, str):
            say(table)
        else:
            print_table(out, table)


def check_json(json_file: Path | None) -> None:
    """Refuse a file that `show` could not write, before there are figures.

    Raises:
        OutputError: it holds something else, or its directory cannot be written.
    """
    if json_file not in (None, STDOUT):
        check_results_file(json_file)


def warn(line: str | None) -> None:
    """Print a warning to standard error, if there is one."""
    if line is not None:
        err.print(
            f"[bold yellow]warning:[/bold yellow] {escape(line)}", highlight=False, soft_wrap=True
        )


class Dtype(str, Enum):
    """Dtypes a base model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# What names a model, besides the directory of one.
NAMES = (
    f".gguf file, hub id, '{EMBEDDED}' for the carried model, or a name that `fetch` knows "
    f"({', '.join(KNOWN)})"
)


def _without_slash(text: str) -> str:
    # Of what is there. What is not there keeps it: a name that ends with a slash is no hub id.
    return str(Path(text)) if text and Path(text).exists() else text


ModelArg = Annotated[str, typer.Argument(help=f"Directory, {NAMES}.")]
DirArg = Annotated[
    str,
    typer.Argument(
        parser=_without_slash,
        metavar="MODEL",
        help=f"Directory of a compressed model; or any causal LM: directory, {NAMES}.",
    ),
]
DataOpt = Annotated[
    list[Path] | None,
    typer.Option("--data", help=".jsonl, .txt or .parquet file; may be repeated."),
]
BlendOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help=".jsonl, .txt or .parquet file; may be repeated. FILE:0.7 gives it 70 % of the tokens.",
    ),
]
FormatOpt = Annotated[
    str | None,
    typer.Option("--format", help=f"Format of the data, if not our own: {', '.join(FORMATS)}."),
]
ChangesOpt = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change the recipe, e.g. dms.window=512; may be repeated."),
]
RawOpt = Annotated[
    bool,
    typer.Option(
        "--raw", help="Continue the prompt as it is, without the tokenizer's chat template."
    ),
]
NewTokensOpt = Annotated[int, typer.Option(min=1, max=LONGEST, help="Tokens to generate.")]
JsonOpt = Annotated[
    Path | None,
    typer.Option("--json", help="Write the figures here as JSON; '-' prints them, and no table."),
]
DtypeOpt = Annotated[
    Dtype,
    typer.Option(help="Dtype of the base model. auto: the checkpoint's own; of GGUF, bfloat16."),
]
DeviceOpt = Annotated[
    str | None, typer.Option(help="Device or device_map, for example 'cuda' or 'auto'.")
]
RatioOpt = Annotated[
    float | None,
    typer.Option("--cr", help="Compression ratio to run at, on the curve that the model carries."),
]
TemperatureOpt = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
SeedOpt = Annotated[int, typer.Option(min=0, max=LARGEST_INTEGER, help="Seed for sampling.")]
TrustOpt = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
