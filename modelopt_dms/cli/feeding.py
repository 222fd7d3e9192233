# SPDX-License-Identifier: Apache-2.0
"""Commands about what gates learn from: preview, traces."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from modelopt_dms.checkpoints.base import check_tokenizer, locate
from modelopt_dms.cli.interrupting import when_interrupted
from modelopt_dms.cli.opening import (
    check_device,
    check_model,
    check_temperature,
    load_any,
    load_tokenizer,
    open_data,
    open_files,
)
from modelopt_dms.cli.options import (
    NAMES,
    STDOUT,
    BlendOpt,
    ChangesOpt,
    DeviceOpt,
    Dtype,
    DtypeOpt,
    FormatOpt,
    JsonOpt,
    ModelArg,
    SeedOpt,
    TemperatureOpt,
    TrustOpt,
    check_json,
    out,
    say,
    show,
)
from modelopt_dms.config.section import LONGEST
from modelopt_dms.config.traces import Sampling, check_traces_output, partial_dir


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
    json_file: JsonOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Count what a retrofit would read and visit, and show how its data begin."""
    place = locate(tokenizer)
    check_json(json_file)
    given = open_data(data, data_format)
    if not given:
        raise ValueError("--data is missing: the .jsonl, .txt or .parquet files to count")
    from modelopt_dms.config.recipe_file import check_recipe

    check_recipe(recipe, changes or [])
    check_tokenizer(place)
    from modelopt_dms.config.recipe import load_recipe
    from modelopt_dms.data.dry_run import preview as count
    from modelopt_dms.evaluation.report import data_table, printable

    chosen = load_recipe(recipe, changes or [])
    words = load_tokenizer(place, trust_remote_code)
    found = count(given, chosen, tokenizer=words, count_all=count_all)
    show(found.summary(), json_file, data_table(found))
    for source in found.sources if json_file != STDOUT else ():
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
        int | None,
        typer.Option(min=1, max=LONGEST, help="Number of traces; by default one a prompt."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=LONGEST, help="Tokens of a trace, at most.")
    ] = 2048,
    temperature: TemperatureOpt = 0.6,
    top_p: Annotated[
        float, typer.Option(help="Sample from tokens that hold this probability.")
    ] = 0.95,
    batch_size: Annotated[
        int, typer.Option(min=1, max=LONGEST, help="Prompts continued together.")
    ] = 8,
    seed: SeedOpt = 0,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Have MODEL itself, with eviction off, continue prompts: data for a retrofit. Goes on if interrupted."""
    check_device(device)
    check_temperature(temperature)
    check_traces_output(output)
    sampling = Sampling(max_new_tokens, temperature, top_p, batch_size, seed)
    given = open_files(prompts, "--prompts", prompts_format)
    place = check_model(model)
    from modelopt_dms.data.documents import tokenize_prompts
    from modelopt_dms.training.traces import generate_traces

    when_interrupted(lambda: f"the same command goes on with {partial_dir(output)}")
    # Of the model nothing but its tokenizer is loaded before the prompts are known to be usable.
    starts = tokenize_prompts(given, load_tokenizer(place, trust_remote_code), count)
    network, tokenizer = load_any(place, dtype, device, trust_remote_code)
    generate_traces(network, starts, tokenizer, output, sampling=sampling)
    say(f"saved to {output}")
