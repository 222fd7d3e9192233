# SPDX-License-Identifier: Apache-2.0
"""Commands that ask a model something: generate, eval."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt_dms.cli.opening import (
    check_device,
    check_model,
    check_ratio,
    check_temperature,
    load_any,
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
    JsonOpt,
    RatioOpt,
    SeedOpt,
    TemperatureOpt,
    TrustOpt,
    check_json,
    out,
    show,
    warn,
)
from modelopt_dms.config.output_dir import check_results_file, write_json
from modelopt_dms.config.section import LONGEST

if TYPE_CHECKING:
    from modelopt_dms.cli.talking import Talk


def generate(
    model: DirArg,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to say; '-' reads standard input. Without it, a conversation: a line a turn, and after each "
            "what the KV cache holds.",
        ),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Continue the prompt as it is, without the tokenizer's chat template."
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=LONGEST, help="Tokens to generate.")
    ] = 128,
    temperature: TemperatureOpt = 0.0,
    seed: SeedOpt = 0,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show what the KV cache held at the end.")
    ] = False,
    json_file: JsonOpt = None,
    cr: RatioOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Talk to a model, compressed or not: its answers as they come, by its chat template if it has one."""
    place = check_model(model)
    check_ratio(place, cr)
    check_temperature(temperature)
    check_device(device)
    check_json(json_file)
    if prompt is not None and not (text := sys.stdin.read() if prompt == "-" else prompt).strip():
        raise ValueError("--prompt is empty; expected text, or leave it out for a conversation")
    if prompt is None and (stats or json_file is not None):
        raise ValueError(
            "--stats and --json are of one --prompt; a conversation shows them by turn"
        )
    from modelopt_dms.cli.talking import Decoding, Talk, converse

    network, tokenizer = load_any(place, dtype, device, trust_remote_code)
    set_ratio(network, cr)
    raw = raw or not getattr(tokenizer, "chat_template", None)
    talk = Talk(network, tokenizer, Decoding(max_new_tokens, temperature, seed), raw)
    if prompt is None:
        converse(talk)
        return
    answer = talk.ask(text, stream=json_file != STDOUT)
    if stats or json_file is not None:
        _show_held(talk, answer, json_file, cr)


def _show_held(talk: "Talk", answer: str, json_file: Path | None, cr: float | None) -> None:
    """What the cache held at the end of an answer, and a warning if that is not what was asked for."""
    from modelopt_dms.cli.talking import dense_figures, dense_line
    from modelopt_dms.gates.thresholds import expected_ratios, ratio_warning
    from modelopt_dms.kvcache.hf_cache import kv_stats
    from modelopt_dms.modeling.convert import is_converted

    if not is_converted(talk.model):
        show({"answer": answer, **dense_figures(talk)}, json_file, dense_line(talk))
        return
    held = kv_stats(talk.model)
    length = int(held.context_tokens)
    expected = expected_ratios(talk.model, length)
    lines = [str(held)]
    if expected is not None:
        low, high = expected
        lines.append(f"expected of texts of this length: {low:.2f}x to {high:.2f}x")
    figures = {"answer": answer, **held.summary(), "expected_compression_ratio": expected}
    show(figures, json_file, *lines)
    warn(ratio_warning(talk.model, held.compression_ratio, length, cr))


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
