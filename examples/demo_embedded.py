# SPDX-License-Identifier: Apache-2.0
"""Watch a small language model learn to forget three quarters of its KV cache, and still answer.

    make demo MODEL=embedded          or          python examples/demo_embedded.py --output demo_output

Compresses the embedded model with the recipe `tiny_cpu`, then asks the same questions of four
models that share weights and cache and differ in what they forget: `full` nothing, `dms` what its
gates learnt to forget, `sliding_window` everything but the first and the newest tokens, `random`
tokens drawn by lot. The last three hold equally many tokens. Writes results.json, live_length.png
and the compressed model to the output directory.
"""

import argparse
import platform
import shutil
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from live_length import LiveTrace, draw_resident_length, trace_resident_length
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

import modelopt_dms
from modelopt_dms.config.output_dir import write_json
from modelopt_dms.config.recipe import recipe_to_yaml
from modelopt_dms.evaluation import peers
from modelopt_dms.evaluation.measure import measure
from modelopt_dms.evaluation.names import TEXT
from modelopt_dms.evaluation.report import results_table
from modelopt_dms.evaluation.report_page import PAGE
from modelopt_dms.evaluation.report_page.build import BRIEF, Origin, build
from modelopt_dms.evaluation.report_page.render import write_page
from modelopt_dms.evaluation.score import Score
from modelopt_dms.evaluation.tasks import TASKS, Episode, make_episodes, training_documents
from modelopt_dms.gates.gate import gates

MODEL = Path(__file__).parent / "embedded_model"
RECIPE = "tiny_cpu"
METHODS = ("full", "dms", "sliding_window", "random")


@dataclass(frozen=True)
class Plan:
    """How much the demo does; the defaults fit two CPU cores and a few minutes."""

    documents: int = 300
    lengths: tuple[int, ...] = (1024, 2048)
    episodes: int = 12
    texts: int = 8
    changes: tuple[str, ...] = ()  # to the recipe


QUICK = Plan(
    documents=12,
    lengths=(256,),
    episodes=2,
    texts=2,
    changes=("retrofit.steps=3", "retrofit.batch_size=1", "retrofit.sequence_length=256"),
)


def run(output: Path, plan: Plan, seed: int, console: Console) -> dict[str, Any]:
    """Compress, evaluate, write; returns what results.json holds."""
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    recipe = modelopt_dms.load_recipe(RECIPE, [*plan.changes, f"retrofit.seed={seed}"])
    assert recipe.retrofit is not None
    console.print(
        f"Compressing {MODEL.name} ({model.num_parameters():,} parameters) with the recipe {RECIPE}"
    )
    documents = training_documents(tokenizer, plan.documents, recipe.retrofit.sequence_length, seed)
    clear(output / "model")
    model = modelopt_dms.compress(
        model,
        recipe,
        tokenizer=tokenizer,
        data=[document.ids for document in documents],
        output_dir=output / "model",
        resume=False,
    )
    compressed = time.perf_counter()
    rows = compare(model, tokenizer, plan, seed, console)
    evaluated = time.perf_counter()
    console.print(results_table(rows, f"{METHODS[0]} cache against three ways to forget"))
    length = max(plan.lengths)
    (episode,) = make_episodes("recall", tokenizer, length, 1, seed + 1)
    show_answer(model, tokenizer, episode, console)
    budget = next(r for r in rows if r["method"] == "dms" and r["length"] == length)[
        "resident_tokens"
    ]
    draw_resident_length(
        traces(model, episode, budget, seed),
        output / "live_length.png",
        "Live KV cache while one conversation is read, then answered token by token",
    )
    origin = Origin("the embedded model", "make demo MODEL=embedded", recipe_to_yaml(recipe))
    brief = replace(BRIEF, length=min(plan.lengths), seed=seed)
    write_page(output / PAGE, build(model, tokenizer, brief, origin))
    results = {
        "rows": rows,
        "recipe": recipe.model_dump(),
        "seed": seed,
        "seconds": {
            "compress": round(compressed - begin, 1),
            "evaluate": round(evaluated - compressed, 1),
            "total": round(time.perf_counter() - begin, 1),
        },
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(output / "results.json", results)
    console.print(
        f"Wrote {output}/report.html (open it in a browser), results.json, live_length.png and model/"
    )
    return results


def clear(directory: Path) -> None:
    """Remove the model that an earlier demo wrote, and nothing else."""
    if (directory / "dms_recipe.yaml").exists() or (directory / "retrofit").exists():
        shutil.rmtree(directory)


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    seed: int,
    console: Console,
) -> list[dict[str, Any]]:
    """Rows of every method, task and length; the peers get the resident tokens that DMS really had."""
    rows = []
    full = peers.full_cache(model)
    for task in (*TASKS, TEXT):
        for length in plan.lengths:
            count = plan.texts if task == TEXT else plan.episodes

            def ask(peer: PreTrainedModel) -> Score:
                return measure(peer, tokenizer, task, length, count, seed)  # noqa: B023

            with console.status(f"{task}, {length} tokens"):
                dms = ask(model)
                scores = {
                    "full": ask(full),
                    "dms": dms,
                    "sliding_window": ask(peers.sliding_window(model, dms.end.resident_tokens)),
                    "random": ask(
                        random_peer(model, dms.end.resident_tokens, dms.end.context_tokens, seed)
                    ),
                }
            rows += [
                {"method": method, "task": task, "length": length, **scores[method].row()}
                for method in METHODS
            ]
    return rows


def random_peer(
    model: PreTrainedModel, resident_tokens: float, context_tokens: float, seed: int
) -> PreTrainedModel:
    """Random eviction that ends with as many resident tokens."""
    window = gates(model)[0].window
    fraction = peers.fraction_for_budget(resident_tokens, context_tokens, window)
    return peers.random_eviction(model, fraction, seed)


def show_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, episode: Episode, console: Console
) -> None:
    """Ask one question with plain `generate`, without and with eviction."""
    question = episode.questions[0]
    ids = torch.tensor([episode.context_ids + question.prompt_ids])
    prompt = str(tokenizer.decode(question.prompt_ids))
    right = str(tokenizer.decode(question.answer_ids))
    console.print(f"\nOne of the questions, after {ids.shape[1]} tokens: [bold]{prompt}[/bold] ...")
    for name, peer in (("full", peers.full_cache(model)), ("dms", model)):
        generator: Any = peer
        out = generator.generate(ids, max_new_tokens=len(question.answer_ids), do_sample=False)
        answer = str(tokenizer.decode(out[0, ids.shape[1] :]))
        verdict = "right" if answer == right else f"wrong: {right.strip()}"
        console.print(f"  {name:5s}{answer.rstrip()}   ({verdict})")
    console.print(f"\n{modelopt_dms.kv_stats(model)}\n")


def traces(
    model: PreTrainedModel, episode: Episode, resident_tokens: float, seed: int
) -> dict[str, LiveTrace]:
    """Live length over one conversation, by method."""
    context = len(episode.context_ids)
    ids = list(episode.context_ids)
    for question in episode.questions:
        ids += question.prompt_ids + question.answer_ids
    methods = {
        "full": peers.full_cache(model),
        "dms": model,
        "sliding_window": peers.sliding_window(model, resident_tokens),
        "random": random_peer(model, resident_tokens, len(ids), seed),
    }
    return {name: trace_resident_length(peer, ids, context) for name, peer in methods.items()}


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    packages = ("torch", "transformers", "nvidia-modelopt")
    found = {name: version(name) for name in packages}
    own = {"python": platform.python_version(), "modelopt-dms": modelopt_dms.__version__}
    return {**own, **found}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe, for example dms.window=32; may be repeated",
    )
    parser.add_argument(
        "--quick", action="store_true", help="seconds, not minutes: only proves it runs"
    )
    args = parser.parse_args(argv)
    hf_logging.disable_progress_bar()
    plan = QUICK if args.quick else Plan()
    plan = replace(plan, changes=(*plan.changes, *args.set))
    args.output.mkdir(parents=True, exist_ok=True)
    run(args.output, plan, args.seed, Console())


if __name__ == "__main__":
    main()
