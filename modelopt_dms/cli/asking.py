# SPDX-License-Identifier: Apache-2.0
"""Commands that ask a model something: generate, eval."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modelopt_dms.cli.opening import check_model, load_any, open_files, set_ratio
from modelopt_dms.cli.options import (
    DataOpt,
    DeviceOpt,
    DirArg,
    Dtype,
    DtypeOpt,
    FormatOpt,
    RatioOpt,
    TrustOpt,
    out,
    warn,
)
from modelopt_dms.config.output_dir import check_results_file, write_json


def generate(
    model: DirArg,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to continue; '-' reads standard input.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show what the KV cache held at the end.")
    ] = False,
    cr: RatioOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Continue a prompt, streaming."""
    place = check_model(model)
    from transformers import TextStreamer, set_seed

    from modelopt_dms.gates.thresholds import expected_ratios, ratio_warning
    from modelopt_dms.kvcache.hf_cache import kv_stats
    from modelopt_dms.modeling.convert import is_converted
    from modelopt_dms.modeling.generation import graphed

    network, tokenizer = load_any(place, dtype, device, trust_remote_code)
    set_ratio(network, cr)
    text = sys.stdin.read() if prompt == "-" else prompt
    inputs = tokenizer(text, return_tensors="pt").to(network.device)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        set_seed(seed)
        sampling["temperature"] = temperature
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    loop: dict[str, Any] = {"streamer": streamer}
    if network.device.type == "cuda" and is_converted(network):
        loop = {"custom_generate": graphed, "stream_to": streamer}
    network.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        **loop,
        **sampling,
    )
    if stats:
        held = kv_stats(network)
        out.print(str(held), highlight=False)
        length = int(held.context_tokens)
        if (expected := expected_ratios(network, length)) is not None:
            low, high = expected
            out.print(
                f"expected of texts of this length: {low:.2f}x to {high:.2f}x", highlight=False
            )
        warn(ratio_warning(network, held.compression_ratio, length, cr))


def evaluate(
    model: DirArg,
    data: DataOpt = None,
    data_format: FormatOpt = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="recall, tracking, arithmetic, text; comma-separated. All, unless --data is given."
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Context lengths in tokens, comma-separated.")
    ] = "512,1024,2048",
    count: Annotated[int, typer.Option(min=1, help="Samples per task and length.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the rows here.")
    ] = None,
    cr: RatioOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Score a model through its physical KV cache: long-memory tasks, and perplexity on text."""
    place = check_model(model)
    given = open_files(data or [], "--data", data_format)
    if json_file is not None:
        check_results_file(json_file)
    from modelopt_dms.evaluation import score
    from modelopt_dms.evaluation.files import score_files
    from modelopt_dms.evaluation.report import results_table
    from modelopt_dms.gates.thresholds import ratio_warning

    sizes = [_length(x) for x in lengths.split(",")]
    network, tokenizer = load_any(place, dtype, device, trust_remote_code)
    set_ratio(network, cr)
    rows: list[dict[str, Any]] = []
    if data:
        rows += score_files(network, tokenizer, given, sizes, count)
    if tasks is not None or not data:
        names = tasks.split(",") if tasks else score.EVALUATIONS
        rows += score.evaluate(network, tokenizer, names, sizes, count, seed)
    if json_file is not None:
        write_json(json_file, rows)
    out.print(results_table(rows))
    found = (
        ratio_warning(network, row["compression_ratio"], int(row["context_tokens"]), cr)
        for row in rows
    )
    # One is enough: the table shows the others.
    warn(next((line for line in found if line is not None), None))


def _length(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 64:
        raise ValueError(f"--lengths: {text!r} must be a whole number of at least 64 tokens")
    return int(text)
