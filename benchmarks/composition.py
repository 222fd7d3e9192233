# SPDX-License-Identifier: Apache-2.0
"""What every shipped recipe gives on the embedded model: tokens, bytes, accuracy; and each of its techniques alone.

    python benchmarks/composition.py --output benchmarks/results/composition.json

What a model becomes (ratio, gate, what learns, number formats) is the recipe's; how it is fitted and trained is scaled
to the embedded model (`CALIBRATION`, `TRAINING`, `DELAY_WINDOW`). Models run in bfloat16, so that a KV cache without a
number format takes two bytes a value, and are compared with the float32 model and its full cache. Bytes are those
allocated at the end of a conversation. Gates are made once for recipes that agree on them, and kept in --work.
"""

import argparse
import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine
from modelopt.torch.quantization.nn import TensorQuantizer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

import modelopt_dms as dms
from modelopt_dms.config.bundled import embedded_model_dir, list_recipes
from modelopt_dms.config.output_dir import write_json
from modelopt_dms.data.batches import calibration_batches
from modelopt_dms.evaluation.measure import measure
from modelopt_dms.evaluation.names import TEXT
from modelopt_dms.evaluation.peers import full_cache
from modelopt_dms.evaluation.tasks import TASKS, training_documents

DELAY_WINDOW = 48
TRAINING: dict[str, Any] = {
    "sequence_length": 512,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 5e-3,
    "lr_scheduler": "cosine",
    "warmup_steps": 5,
    "ramp_fraction": 0.6,
    "kl_chunk_tokens": 4096,
    "sharding": "none",
}
CALIBRATION: dict[str, Any] = {"samples": 64, "sample_length": 1024, "batch_size": 4}
# Whole weights move further than gates at the same rate.
ALL_WEIGHTS_LEARNING_RATE = 5e-4


def scaled(name: str, args: argparse.Namespace) -> dms.Recipe:
    """A shipped recipe at the size of the embedded model."""
    recipe = dms.load_recipe(name)
    changes: dict[str, Any] = {"dms.window": args.window, "dms.scale": 10.0}
    if recipe.retrofit is not None:
        changes |= {f"retrofit.{key}": value for key, value in TRAINING.items()}
        changes |= {"retrofit.steps": args.steps, "retrofit.sequence_length": args.sequence_length}
        changes |= {"retrofit.rate_weight": args.rate_weight, "retrofit.save_steps": args.steps}
    if recipe.calibrate is not None:
        changes |= {f"calibrate.{key}": value for key, value in CALIBRATION.items()}
        if recipe.retrofit is not None:
            # As many tokens a step, in samples as long as calibration's; thresholds are where they belong: no ramp.
            changes["retrofit.sequence_length"] = CALIBRATION["sample_length"]
            changes["retrofit.batch_size"] = TRAINING["batch_size"] // 2
            changes["retrofit.ramp_fraction"] = 0.0
    if recipe.retrofit is not None and recipe.retrofit.train == "all":
        changes["retrofit.learning_rate"] = ALL_WEIGHTS_LEARNING_RATE
    if recipe.quantize is not None:
        changes |= {"quantize.samples": 64, "quantize.sample_length": args.sequence_length}
    return dms.load_recipe(recipe, changes)


def retrofitted(recipe: dms.Recipe, documents: list[list[int]], work: Path) -> PreTrainedModel:
    """The embedded model with the recipe's gates, fitted and trained in float32, in bfloat16."""
    plain = dms.Recipe(dms=recipe.dms, calibrate=recipe.calibrate, retrofit=recipe.retrofit)
    facts = json.dumps(plain.model_dump(exclude_none=True), sort_keys=True)
    place = work / hashlib.sha256(facts.encode()).hexdigest()[:12]
    if not (place / "config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
        dms.compress(base, plain, data=documents, output_dir=place)
    return dms.load(place, dtype=torch.bfloat16)


def evaluate(model: PreTrainedModel, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy over the tasks, perplexity, and what the cache held at the end."""
    scores = [
        measure(model, tokenizer, task, args.length, args.episodes, args.seed) for task in TASKS
    ]
    text = measure(model, tokenizer, TEXT, args.length, args.episodes, args.seed)
    questions = sum(x.count for x in scores)
    ends = [x.end for x in scores]
    return {
        "accuracy": sum(x.value * x.count for x in scores) / questions,
        "questions": questions,
        "perplexity": text.value,
        "compression_ratio": sum(x.compression_ratio for x in ends) / len(ends),
        "kv_bytes_per_token": sum(x.kv_bytes for x in ends) / sum(x.context_tokens for x in ends),
    }


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights: quantized ones packed, scales included; gates in float32, the rest in bfloat16."""
    total = sum(
        (4 if ".dms_gate." in name else 2) * x.numel() for name, x in model.named_parameters()
    )
    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
            continue
        weight: Any = module.weight
        bits = 4 if quantizer.num_bits in (4, (2, 1)) else 8
        scales = 4 * quantizer.amax.numel()
        if quantizer.block_sizes:
            scales += weight.numel() // quantizer.block_sizes[-1]
        total += weight.numel() * bits // 8 + scales - 2 * weight.numel()
    return total


def rows(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """One row for the untouched model, and one a recipe."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    made = training_documents(tokenizer, args.documents, args.sequence_length, args.seed)
    documents = [x.ids for x in made]
    longer = CALIBRATION["sample_length"]
    made = training_documents(tokenizer, args.documents, longer, args.seed)
    long_documents = [x.ids for x in made]
    found: list[dict[str, Any]] = []
    alone: dict[str, dict[str, Any]] = {}

    def once(key: str, model: PreTrainedModel) -> dict[str, Any]:
        if key not in alone:
            alone[key] = evaluate(model, tokenizer, args)
        return alone[key]

    base = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    console.print("untouched model, float32")
    cfg = base.config
    values = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim
    found.append(
        {
            "recipe": "(none)",
            **evaluate(base.eval(), tokenizer, args),
            "kv_bytes_per_token": 2 * values,
            "kv_reduction": 1.0,
            "weight_bytes": weight_bytes(base),
        }
    )
    for name in args.recipes:
        recipe = scaled(name, args)
        console.print(name)
        texts = documents if recipe.calibrate is None else long_documents
        model = retrofitted(recipe, texts, args.work)
        gates = (recipe.dms, recipe.calibrate, recipe.retrofit)
        facts = json.dumps([None if x is None else x.model_dump() for x in gates])
        dms_alone = once(facts, model)
        if recipe.quantize is None:
            together, without_dms = dms_alone, once("full " + facts, full_cache(model))
        else:
            batches = calibration_batches(
                model, documents, None, samples=64, length=args.sequence_length, batch_size=8
            )
            model = dms.quantize(copy.deepcopy(model), recipe.quantize, batches)
            together = evaluate(model, tokenizer, args)
            without_dms = evaluate(full_cache(model), tokenizer, args)
        found.append(
            {
                "recipe": name,
                **together,
                "kv_reduction": 2 * values / together["kv_bytes_per_token"],
                "weight_bytes": weight_bytes(model),
                "dms_alone": dms_alone,
                "quantization_alone": without_dms,
            }
        )
        write_json(args.output, {"machine": machine(), "settings": settings(args), "rows": found})
    return found


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    own = {key: value for key, value in vars(args).items() if key not in ("output", "work")}
    return {
        **own,
        "calibration": CALIBRATION,
        "training": TRAINING,
        "all_weights_lr": ALL_WEIGHTS_LEARNING_RATE,
    }


def table(found: Sequence[dict[str, Any]]) -> Table:
    """What a reader wants to see of the rows."""
    drawn = Table(title="Every shipped recipe on the embedded model")
    drawn.add_column("recipe", no_wrap=True)
    for name in (
        "CR",
        "KV B/token",
        "KV total",
        "weights kB",
        "accuracy",
        "ppl",
        "no DMS",
        "DMS only",
    ):
        drawn.add_column(name, justify="right", no_wrap=True)
    for row in found:
        drawn.add_row(
            row["recipe"],
            f"{row['compression_ratio']:.2f}x",
            f"{row['kv_bytes_per_token']:.1f}",
            f"{row['kv_reduction']:.1f}x",
            f"{row['weight_bytes'] / 1000:.0f}",
            f"{100 * row['accuracy']:.1f} %",
            f"{row['perplexity']:.2f}",
            *(
                f"{100 * row[x]['accuracy']:.1f} %, {row[x]['perplexity']:.2f}" if x in row else ""
                for x in ("quantization_alone", "dms_alone")
            ),
        )
    return drawn


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/composition.json"))
    parser.add_argument("--work", type=Path, default=Path("out/composition"))
    sized = [x for x in list_recipes() if "tiny_cpu" not in x]  # what the demo shows is left out
    parser.add_argument("--recipes", nargs="+", default=sized)
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of every retrofit")
    parser.add_argument("--window", type=int, default=DELAY_WINDOW)
    parser.add_argument("--sequence-length", type=int, default=TRAINING["sequence_length"])
    parser.add_argument("--rate-weight", type=float, default=1.5)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--length", type=int, default=2048, help="context tokens of an episode")
    parser.add_argument("--episodes", type=int, default=8, help="per task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    hf_logging.disable_progress_bar()
    console = Console(width=150)
    console.print(table(rows(args, console)))


if __name__ == "__main__":
    main()
