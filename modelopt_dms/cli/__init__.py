# SPDX-License-Identifier: Apache-2.0
"""The command line: modelopt-dms {fetch, compress, preview, traces, generate, eval, lm-eval, tune, export, ...}.

Heavy imports stand inside the commands, so that --help answers at once.
"""

import os
import sys
import warnings

import typer
from rich.markup import escape

from modelopt_dms.cli.asking import evaluate, generate
from modelopt_dms.cli.engines import engine_app
from modelopt_dms.cli.feeding import preview, traces
from modelopt_dms.cli.fetching import fetch
from modelopt_dms.cli.harness import PASSED_ON, lm_eval
from modelopt_dms.cli.listing import recipes_app
from modelopt_dms.cli.making import compress, export, tune
from modelopt_dms.cli.options import err
from modelopt_dms.cli.planning import plan
from modelopt_dms.cli.serving import serve

DEBUG = "MODELOPT_DMS_TRACEBACK"

app = typer.Typer(
    help="Teach a causal LM what its KV cache may forget (Dynamic Memory Sparsification).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(fetch)
app.command()(compress)
app.command()(preview)
app.command()(traces)
app.command()(generate)
app.command("eval")(evaluate)
app.command("lm-eval", context_settings=PASSED_ON)(lm_eval)
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
        app()
    except KeyboardInterrupt:
        err.print("[red]interrupted[/red]; the same command goes on from the newest checkpoint")
        sys.exit(130)
    except Exception as error:
        if os.environ.get(DEBUG) or not _expected(error):
            raise
        err.print(
            f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)


def _expected(error: Exception) -> bool:
    """Whether the message says it all."""
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return True
    # Who raised this one has imported it, and torch with it.
    paged = sys.modules.get("modelopt_dms.kernels.layout")
    return paged is not None and isinstance(error, paged.OutOfPagesError)
