# SPDX-License-Identifier: Apache-2.0
"""How many tokens every head holds while one text is read and continued: measured, and drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from modelopt_dms.config.output_dir import atomic_file
from modelopt_dms.kvcache.hf_cache import cache_argument, cache_of, kv_stats


@dataclass(frozen=True)
class LiveTrace:
    """Live length of every layer and head while one text is read and continued.

    Attributes:
        seen: tokens seen [N] at each measurement.
        live: resident tokens [N, layers, K].
        context: how many of the tokens were read; the rest were generated one by one.
    """

    seen: list[int]
    live: torch.Tensor
    context: int


@torch.no_grad()
def trace_resident_length(
    model: PreTrainedModel, ids: Sequence[int], context: int, chunk: int = 16
) -> LiveTrace:
    """Feed a text through the cache of a converted model, its `context` in chunks, the rest by token, and measure."""
    tokens = torch.tensor([list(ids)], device=model.device)
    cache, seen, live = None, [0], []
    for part in (*tokens[:, :context].split(chunk, 1), *tokens[:, context:].split(1, 1)):
        given = cache_argument(type(model).forward, cache)
        out = model(input_ids=part, use_cache=True, logits_to_keep=1, **given)
        cache = cache_of(out)
        seen.append(seen[-1] + part.shape[1])
        live.append(torch.stack([layer.resident[0] for layer in kv_stats(cache).layers]))
    return LiveTrace(seen, torch.stack([torch.zeros_like(live[0]), *live]), context)


def draw_resident_length(traces: Mapping[str, LiveTrace], path: Path, title: str) -> None:
    """Write a PNG: left the mean live length of each method, with "full"; right each layer and head of "dms"."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for name, trace in traces.items():
        style = "--" if name == "full" else "-"
        left.plot(trace.seen, trace.live.double().mean((1, 2)), style, label=name)
    left.set_title("mean over layers and heads")
    dms = traces["dms"]
    layers = dms.live.shape[1]
    for layer in range(layers):
        for head in range(dms.live.shape[2]):
            color = f"C{layer}"
            label = f"layer {layer}" if head == 0 else None
            right.plot(dms.seen, dms.live[:, layer, head], color=color, lw=1, label=label)
    right.plot(dms.seen, dms.seen, "--", color="grey", lw=1, label="everything")
    right.set_title("dms: every layer and KV head")
    for axes in (left, right):
        axes.axvline(dms.context, color="grey", lw=0.8, ls=":")
        axes.set_xlabel("tokens seen (dotted line: end of the context)")
        axes.set_ylabel("resident tokens")
        axes.legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
