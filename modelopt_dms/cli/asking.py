# SPDX-License-Identifier: Apache-2.0
"""The command generate: a model answers, or continues a text."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelopt_dms.cli.opening import (
    beyond_model,
    check_device,
    check_model,
    check_ratio,
    check_temperature,
    load_any,
    set_ratio,
)
from modelopt_dms.cli.options import (
    STDOUT,
    DeviceOpt,
    DirArg,
    Dtype,
    DtypeOpt,
    JsonOpt,
    NewTokensOpt,
    RatioOpt,
    RawOpt,
    SeedOpt,
    TemperatureOpt,
    TrustOpt,
    check_json,
    show,
    warn,
)

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
    raw: RawOpt = False,
    max_new_tokens: NewTokensOpt = 128,
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
    if talk.seen is not None:
        warn(beyond_model(place, talk.seen.shape[1] + 1, "prompt and answer"))
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
