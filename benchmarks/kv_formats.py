# SPDX-License-Identifier: Apache-2.0
"""What low-bit KV rows cost on a real model, with and without eviction: KL from the base model by category of text.

    modelopt-dms fetch smollm2
    modelopt-dms compress smollm2 --recipe calibrated_cr4-1k --output smollm2-cr4
    python benchmarks/kv_formats.py smollm2-cr4 --output benchmarks/results/kv_formats.json

The KV quantizers of ModelOpt, of which the cache stores exactly what they compute, are put on the calibrated model as
it is; `compress` would measure its curve anew under them. At a ratio of 1 no gate evicts: what is left is the format's
own cost. Bits count scales. Every row is written when it is there; the same command goes on where it stopped.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, save
from real_models import FIDELITY, Rows, Study, named_path
from real_texts import calibration_documents
from rich.console import Console
from transformers.utils import logging as hf_logging

import modelopt_dms as dms
from modelopt_dms.gates.gate import gates

BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
NVFP4 = {"num_bits": (2, 1), "block_sizes": BLOCKS}
FP8_ROW = {"num_bits": (4, 3), "axis": (0, 1, 2), "type": "dynamic"}
FP8 = {"num_bits": (4, 3), "axis": None}
INT8_HEAD = {"num_bits": 8, "axis": 1}
# Formats of keys and values; bits of a number at 64 to a row, both together.
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any], float] | None] = {
    "model dtype": None,
    "int8, a scale per head": (INT8_HEAD, INT8_HEAD, 8.0),
    "fp8, a scale per row": (FP8_ROW, FP8_ROW, 8.5),
    "fp8, one scale": (FP8, FP8, 8.0),
    "keys fp8 per row, values nvfp4": (FP8_ROW, NVFP4, 6.5),
    "keys nvfp4, values fp8 per row": (NVFP4, FP8_ROW, 6.5),
    "nvfp4": (NVFP4, NVFP4, 4.5),
}
SAMPLES = 8  # of 1,024 tokens, for the ranges


def quantized(path: Path, dtype: str, name: str, tokenizer: Any) -> Any:
    """The model with these formats."""
    model = dms.load(path, dtype=dtype).eval()
    formats = FORMATS[name]
    if formats is None:
        return model
    entries = [
        {"quantizer_name": f"*{part}_bmm_quantizer", "cfg": cfg, "enable": True}
        for part, cfg in zip("kv", formats[:2], strict=True)
    ]
    config = {
        "algorithm": "max",
        "quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries],
    }
    texts = calibration_documents("docstrings", 0, {})
    ids = tokenizer("\n\n".join(texts)[: 8 * 1024 * SAMPLES])["input_ids"]
    return dms.quantize(model, config, [x[None] for x in torch.tensor(ids).split(1024)[:SAMPLES]])


def draw(figure: Any, content: dict[str, Any]) -> None:
    """KL of each format at each ratio, a dot a category."""
    axes = figure.subplots()
    names = list(FORMATS)
    for shift, ratio in ((-0.15, 1.0), (0.15, content["settings"]["ratio"])):
        rows = [x for x in content["rows"] if x["ratio"] == ratio]
        places = [names.index(x["method"]) + shift for x in rows]
        axes.plot([x["kl"] for x in rows], places, "o", label=f"CR {ratio:g}", markersize=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("KL from the base model, nats per token; dots: kinds of text")
    axes.legend()
    figure.set_size_inches(8, 4)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="a DMS directory without quantization")
    parser.add_argument("--model", default="smollm2", help="what it was made from")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--count", type=int, help="samples of a kind of text; 3 by default")
    parser.add_argument("--seed", type=int, default=7, help="of samples")
    parser.add_argument("--text", type=named_path, nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--output", type=Path, default=RESULTS / "kv_formats.json")
    args = parser.parse_args(argv)
    args.haystack, args.text, args.tasks = None, dict(args.text), [FIDELITY]
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, save."""
    args = arguments(argv)
    hf_logging.disable_progress_bar()
    settings = {name: getattr(args, name) for name in ("dtype", "length", "ratio", "seed")}
    rows = Rows(args.output, settings)
    study = Study(args, args.dtype, rows, Console(width=160))
    for name in FORMATS:
        if all(not rows.missing(study.keys(name, args.length, x)) for x in (args.ratio, 1.0)):
            continue
        model = quantized(args.directory, args.dtype, name, study.tokenizer)
        study.measure(model, name, args.length, args.ratio)
        for gate in gates(model):
            gate.threshold.fill_(torch.inf)
        study.measure(model, name, args.length, 1.0)
    bits = {name: None if x is None else x[2] for name, x in FORMATS.items()}
    save(args.output, {**rows.content, "settings": settings, "bits": bits}, draw)


if __name__ == "__main__":
    main()
