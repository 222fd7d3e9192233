# SPDX-License-Identifier: Apache-2.0
"""Commands about what gates learn from: preview, traces."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from modelopt_dms.checkpoints.base import locate
from modelopt_dms.cli.opening import check_model, load_any, load_tokenizer, open_data, open_files
from modelopt_dms.cli.options import (
    NAMES,
    BlendOpt,
    ChangesOpt,
    DeviceOpt,
    Dtype,
    DtypeOpt,
    FormatOpt,
    ModelArg,
    TrustOpt,
    out,
)


def preview(
    tokenizer: Annotated[
        str,
        typer.Option(
            help=f"Tokenizer, by its own directory or hub id, or by its model: directory, {NAMES}."
        ),
    ],
    data: BlendOpt = None,
    data_format: FormatOpt = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name or YAML file.")] = "dms_cr4",
    changes: ChangesOpt = None,
    count_all: Annotated[
        bool, typer.Option("--all", help="Count all documents, not only those that a run reads.")
    ] = False,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Count what a retrofit would read and visit, and show how its data begin."""
    place = locate(tokenizer)
    given = open_data(data, data_format)
    if not given:
        raise ValueError("--data is missing: the .jsonl, .txt or .parquet files to count")
    from modelopt_dms.config.recipe import load_recipe
    from modelopt_dms.data.dry_run import preview as count
    from modelopt_dms.evaluation.report import data_table, printable

    chosen = load_recipe(recipe, changes or [])
    words = load_tokenizer(place, trust_remote_code)
    found = count(given, chosen, tokenizer=words, count_all=count_all)
    out.print(data_table(found))
    for source in found.sources:
        out.print(f"\n[bold]{escape(printable(source.name))}[/bold] begins:", highlight=False)
        out.print(printable(source.excerpt), markup=False, highlight=False)


def traces(
    model: ModelArg,
    prompts: Annotated[
        list[Path],
        typer.Option("--prompts", help=".jsonl, .txt or .parquet file; may be repeated."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=".jsonl file for the result.")],
    prompts_format: FormatOpt = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Number of traces; by default one a prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a trace, at most.")] = 2048,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.6,
    top_p: Annotated[
        float, typer.Option(help="Sample from tokens that hold this probability.")
    ] = 0.95,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts continued together.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed for sampling.")] = 0,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Have MODEL itself, with eviction off, continue prompts: data for a retrofit. Goes on if interrupted."""
    place = check_model(model)
    given = open_files(prompts, "--prompts", prompts_format)
    from modelopt_dms.data.documents import tokenize_prompts
    from modelopt_dms.training.traces import Sampling, check_traces_output, generate_traces

    sampling = Sampling(max_new_tokens, temperature, top_p, batch_size, seed)
    check_traces_output(output)
    # Of the model nothing but its tokenizer is loaded before the prompts are known to be usable.
    starts = tokenize_prompts(given, load_tokenizer(place, trust_remote_code), count)
    network, tokenizer = load_any(place, dtype, device, trust_remote_code)
    generate_traces(network, starts, tokenizer, output, sampling=sampling)
    out.print(f"saved to {escape(str(output))}", highlight=False)
