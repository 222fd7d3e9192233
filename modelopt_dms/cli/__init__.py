# SPDX-License-Identifier: Apache-2.0
"""The command line: modelopt-dms {fetch, compress, traces, generate, eval, lm-eval, report, tune, export, ...}.

Heavy imports stand inside the commands, so that --help answers at once.
"""

import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.markup import escape

from modelopt_dms.cli.asking import generate
from modelopt_dms.cli.engines import engine_app
from modelopt_dms.cli.feeding import preview, traces
from modelopt_dms.cli.fetching import fetch
from modelopt_dms.cli.harness import PASSED_ON, lm_eval
from modelopt_dms.cli.interrupting import Commands
from modelopt_dms.cli.listing import recipes_app
from modelopt_dms.cli.making import compress, export, tune
from modelopt_dms.cli.named_output import named_output
from modelopt_dms.cli.options import err, say
from modelopt_dms.cli.planning import plan
from modelopt_dms.cli.reporting import report
from modelopt_dms.cli.scoring import evaluate
from modelopt_dms.cli.serving import serve
from modelopt_dms.config.progress import showing

DEBUG = "MODELOPT_DMS_TRACEBACK"


def _print_version(wanted: bool) -> None:
    if wanted:
        for name in ("modelopt-dms", "torch", "transformers", "nvidia-modelopt"):
            try:
                say(f"{name} {version(name)}")
            except PackageNotFoundError:
                say(f"{name} not installed")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def every(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions."),
    ] = False,
) -> None:
    """Teach a causal LM what its KV cache may forget (Dynamic Memory Sparsification)."""


app.command()(fetch)
app.command()(compress)
app.command()(preview)
app.command()(traces)
app.command()(generate)
app.command("eval")(evaluate)
app.command("lm-eval", context_settings=PASSED_ON)(lm_eval)
app.command()(report)
app.command()(tune)
app.command()(export)
app.command()(plan)
app.command()(serve)
app.add_typer(engine_app, name="engine")
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)


def main() -> None:
    """Run the command line; an expected error is one line, not a traceback."""
    # We test this combination ourselves; ModelOpt's own list of versions is older.
    warnings.filterwarnings(
        "ignore", message="transformers .* is not tested with current version of modelopt"
    )
    try:
        with named_output(), showing():
            app()
    except Exception as error:
        if os.environ.get(DEBUG) or not is_expected(error):
            raise
        err.print(
            f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)


def is_expected(error: Exception) -> bool:
    """Whether the message says it all."""
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return True
    # Who raised this one has imported it, and torch with it.
    paged = sys.modules.get("modelopt_dms.kernels.layout")
    return paged is not None and isinstance(error, paged.OutOfPagesError)
