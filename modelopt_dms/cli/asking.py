# SPDX-License-Identifier: Apache-2.0
"""The command generate: a model continues a prompt."""

import sys
from typing import Annotated, Any

import typer

from modelopt_dms.cli.opening import check_model, load_any, set_ratio
from modelopt_dms.cli.options import (
    DeviceOpt,
    DirArg,
    Dtype,
    DtypeOpt,
    RatioOpt,
    TrustOpt,
    out,
    warn,
)


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
