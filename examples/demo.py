# SPDX-License-Identifier: Apache-2.0
"""Let a real small language model forget three quarters of a text, and ask it about the text.

    make demo          or          python examples/demo.py --output demo_output

Fetches SmolLM2-135M-Instruct, fits gates to text that the package makes itself (recipe `calibrated_cr4-1k`, no
training), and asks the same questions of four caches: the full one, DMS, and two ways to forget that need no gates,
KeyDiff and StreamingLLM, which hold equally many tokens. What is asked about was never calibrated on. Writes
results.json, report.html, smollm2.png and the compressed model to the output directory.

`make demo MODEL=embedded` needs no download: examples/demo_embedded.py.
"""

import argparse
import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import demo_embedded
import torch
from demo_embedded import clear, versions
from demo_picture import Passage, draw
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

import modelopt_dms
from modelopt_dms.checkpoints.base import computes_bfloat16, load_base
from modelopt_dms.checkpoints.fetch import KNOWN, FetchError, fetch
from modelopt_dms.config.output_dir import write_json
from modelopt_dms.config.recipe import recipe_to_yaml
from modelopt_dms.data.mix import calibration_mix
from modelopt_dms.evaluation.fidelity import Fidelity, fidelity
from modelopt_dms.evaluation.footprint import Footprint
from modelopt_dms.evaluation.memories import METHODS, Story, asks_of, is_right, memories, story
from modelopt_dms.evaluation.report_page import PAGE
from modelopt_dms.evaluation.report_page.build import Origin, ReportPlan, answer_figures, start
from modelopt_dms.evaluation.report_page.material import plain_texts
from modelopt_dms.evaluation.report_page.render import write_page
from modelopt_dms.evaluation.report_page.retention import Retention, retention
from modelopt_dms.evaluation.report_page.tradeoff import Point
from modelopt_dms.evaluation.report_page.tradeoff import figures as report_points
from modelopt_dms.evaluation.ruler import Family, make_prompts

REAL = "smollm2"
RECIPE = "calibrated_cr4-1k"
KINDS: dict[Family, str] = {"needle": "needles", "multikey": "multi-key"}
# Right answers by method and family.
Counts = dict[str, dict[Family, int]]
PICTURED = 3  # of the facts
SHOWN = 45  # tokens before and after the fact in the picture


@dataclass(frozen=True)
class Plan:
    """How much the demo does; the defaults fit two CPU cores and five minutes."""

    length: int = 1024
    count: Mapping[Family, int] = field(default_factory=lambda: {"needle": 8, "multikey": 6})
    tokens: int = 12  # of an answer
    changes: tuple[str, ...] = ()  # to the recipe


QUICK = Plan(
    length=400,
    count={"needle": 1, "multikey": 1},
    tokens=6,
    changes=(
        "dms.window=16",
        "calibrate.samples=3",
        "calibrate.held_out=1",
        "calibrate.sample_length=256",
        "calibrate.curve=[4]",
    ),
)


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Measure what is inside."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - begin, 1)


def bring(name: str, console: Console) -> bool:
    """Fetch a known model; if it cannot be had, say so in one line."""
    try:
        fetch(name, on_progress=lambda line: console.print(line, markup=False, highlight=False))
    except (FetchError, OSError) as error:
        console.print(
            f"{name} cannot be had here ({error}); the demo runs on the embedded model instead.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return False
    return True


def run(
    name: str, output: Path, plan: Plan, seed: int, dtype: str, console: Console
) -> dict[str, Any]:
    """Compress, ask, compare, draw, write; returns what results.json holds."""
    clock = Clock()
    with clock.time("load"):
        plain, tokenizer = load_base(name, dtype=dtype)
    about = KNOWN[name].about if name in KNOWN else name
    console.print(
        f"[bold]1. Compress[/bold] {about}: {plain.num_parameters():,} parameters, computed in {dtype}. "
        "No training: gates are fitted in one pass.",
        highlight=False,
    )
    with clock.time("compress"):
        model, recipe = compress(plain, tokenizer, output / "model", plan, seed)
    console.print(
        "\n[bold]2. Ask.[/bold] The model reads a text and its cache is cut; only then come the questions.",
        highlight=False,
    )
    with clock.time("ask"):
        told = story(tokenizer, plan.length)
        answers, held = ask_story(plain, model, tokenizer, told, plan, console)
    console.print(answers_table(answers, held))
    with clock.time("search"):
        found, caches = search(plain, model, tokenizer, plan, seed, console)
    console.print(found_table(found, plan.count, caches))
    console.print(
        "KeyDiff and StreamingLLM are our own few lines (modelopt_dms/evaluation/peers.py); "
        "benchmarks/real_models.py compares with NVIDIA's kvpress itself.",
        highlight=False,
    )
    with clock.time("texts"), console.status("two plain texts, with and without eviction"):
        plain_text = plain_texts(tokenizer, plan.length, seed)
        compared = fidelity(model, {k: [v] for k, v in plain_text.items()})
    console.print(texts_table(compared, plan.length))
    with clock.time("picture"):
        kept = retention(model, tokenizer, told.ids, told.spans)
        origin = Origin(name, f"python examples/demo.py --seed {seed}", recipe_to_yaml(recipe))
        figures = start(model, origin, ReportPlan(plan.length, seed=seed), kept, "facts in prose")
        figures["answers"] = answer_figures(answers, held)
        figures |= points(found, plan.count, caches, compared, recipe)
        write_page(output / PAGE, figures)
        picture(output / "smollm2.png", about.split(",")[0], kept, told, found, plan, caches)
    results = {
        "model": about,
        "dtype": dtype,
        "seed": seed,
        "length": plan.length,
        "recipe": recipe.model_dump(exclude_none=True),
        "answers": answers,
        "answer_caches": {method: asdict(x) for method, x in held.items()},
        "asked": dict(plan.count),
        "found": found,
        "caches": {method: asdict(x) for method, x in caches.items()},
        "texts": {text: asdict(x) for text, x in compared.items()},
        "seconds": {**clock.seconds, "total": round(sum(clock.seconds.values()), 1)},
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    write_json(output / "results.json", results)
    console.print(ending(output, results), highlight=False, soft_wrap=True)
    return results


def compress(
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Path,
    plan: Plan,
    seed: int,
) -> tuple[PreTrainedModel, modelopt_dms.Recipe]:
    """A DMS model made of the same weights; `plain` is left as it is, for the others."""
    recipe = modelopt_dms.load_recipe(RECIPE, [*plan.changes, f"calibrate.seed={seed}"])
    assert recipe.calibrate is not None
    how = recipe.calibrate
    documents = calibration_mix(how.samples + how.held_out, how.sample_length, tokenizer, seed)
    clear(place)
    model = modelopt_dms.compress(
        copy.deepcopy(plain),
        recipe,
        tokenizer=tokenizer,
        data=documents,
        output_dir=place,
        resume=False,
    )
    return model, recipe


def ask_story(
    plain: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    told: Story,
    plan: Plan,
    console: Console,
) -> tuple[list[dict[str, Any]], dict[str, Footprint]]:
    """What every method answers to every question about the story, and what its cache held then."""
    held = memories(plain, model, told.ids)
    rows = []
    for ask in track(told.asks, "questions", console=console, transient=True):
        said = {method: x.answer(ask, plan.tokens, tokenizer) for method, x in held.items()}
        rows.append({"question": ask.question, "right": ask.right, "answers": said})
    return rows, {method: x.footprint for method, x in held.items()}


def search(
    plain: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    seed: int,
    console: Console,
) -> tuple[Counts, dict[str, Footprint]]:
    """Right answers by method and family, and what the caches held on average."""
    prompts = [
        (family, episode)
        for family, count in plan.count.items()
        for episode in make_prompts(family, tokenizer, plan.length, count, seed)
    ]
    found: Counts = {method: dict.fromkeys(plan.count, 0) for method in METHODS}
    sizes: dict[str, list[Footprint]] = {method: [] for method in METHODS}
    for family, episode in track(prompts, "needles", console=console, transient=True):
        held = memories(plain, model, episode.context_ids)
        (ask,) = asks_of(episode, tokenizer)
        tokens = len(episode.questions[0].answer_ids)
        for method, x in held.items():
            found[method][family] += x.answer(ask, tokens, tokenizer) == ask.right
            sizes[method].append(x.footprint)
    return found, {method: _mean(x) for method, x in sizes.items()}


def _mean(parts: list[Footprint]) -> Footprint:
    names = ("context_tokens", "resident_tokens", "kv_bytes", "dense_bytes")
    seen, live, held, dense = (sum(getattr(x, y) for x in parts) / len(parts) for y in names)
    return Footprint(seen, live, held, dense, seen / live)


def answers_table(rows: list[dict[str, Any]], held: Mapping[str, Footprint]) -> Table:
    """Question, right answer, and what each method said."""
    seen = held["full"].context_tokens
    table = Table(
        title=f"\nAsked about a text of {seen:.0f} tokens",
        title_justify="left",
        show_lines=True,
        padding=(0, 0, 0, 1),
    )
    table.add_column("question", ratio=3)
    table.add_column("right", ratio=2)
    for method, words in METHODS.items():
        tokens = round(held[method].resident_tokens)
        table.add_column(f"{words}\n{tokens} tokens", ratio=2)
    for row in rows:
        said = [verdict(x, row["right"]) for x in row["answers"].values()]
        table.add_row(escape(row["question"]), escape(row["right"]), *said)
    return table


def verdict(answer: str, right: str) -> str:
    """An answer for the table, green if what is right stands in it."""
    return f"[{'green' if is_right(answer, right) else 'red'}]{mark(answer, right)}[/]"


def mark(answer: str, right: str) -> str:
    """An answer with a mark that can be read without colours."""
    return f"{'✓' if is_right(answer, right) else '✗'} {escape(answer) or '(nothing)'}"


def found_table(
    found: Counts,
    asked: Mapping[Family, int],
    caches: Mapping[str, Footprint],
) -> Table:
    """Facts found and what the caches held, one column a method."""
    seen = caches["full"].context_tokens
    table = Table(
        title=f"\nFacts found in {sum(asked.values())} other texts of {seen:.0f} tokens on average",
        title_justify="left",
        caption="needles: one fact in a text; multi-key: four, one of them asked for (RULER).\n"
        "Bytes are those allocated: lists that grow have room to spare.",
        caption_justify="left",
        padding=(0, 0, 0, 1),
    )
    table.add_column("")
    for words in METHODS.values():
        table.add_column(words, justify="right", no_wrap=True)
    for family, count in asked.items():
        table.add_row(
            f"{KINDS[family]} found, of {count}", *(str(found[x][family]) for x in METHODS)
        )
    held = [caches[x] for x in METHODS]
    table.add_section()
    table.add_row("tokens held by a head", *(f"{x.resident_tokens:.0f}" for x in held))
    table.add_row("compression ratio", *(f"{x.compression_ratio:.2f}x" for x in held))
    table.add_row("KV bytes a token read", *(f"{x.kv_bytes / seen:,.0f}" for x in held))
    return table


def texts_table(found: Mapping[str, Fidelity], length: int) -> Table:
    """How far the model is from itself with the full cache on plain text."""
    table = Table(
        title=f"\nDMS beside the full cache on {length} tokens of text",
        title_justify="left",
        padding=(0, 0, 0, 1),
    )
    table.add_column("text")
    for name in ("ppl, full", "ppl, DMS", "mean KL", "same next token", "CR"):
        table.add_column(name, justify="right", no_wrap=True)
    for text, x in found.items():
        table.add_row(
            text,
            f"{x.perplexity_full:.2f}",
            f"{x.perplexity:.2f}",
            f"{x.kl:.3f}",
            f"{100 * x.top1:.1f} %",
            f"{x.compression_ratio:.2f}x",
        )
    return table


def picture(
    path: Path,
    name: str,
    kept: Retention,
    told: Story,
    found: Counts,
    plan: Plan,
    caches: Mapping[str, Footprint],
) -> None:
    """Draw the surroundings of one of the story's facts, and the bars."""
    held, heads = kept.heads_holding(), len(kept.rows)
    span = told.spans[PICTURED]
    begin, end = max(0, span.start - SHOWN), span.stop + SHOWN
    shown = Passage(
        tokens=kept.tokens[begin:end],
        held=held[begin:end],
        heads=heads,
        fact=range(span.start - begin, span.stop - begin),
    )
    dms = caches["dms"]
    draw(
        path,
        shown,
        {
            METHODS[x]: {KINDS[family]: n for family, n in counts.items()}
            for x, counts in found.items()
        },
        {KINDS[family]: n for family, n in plan.count.items()},
        f"What is left of a text of {len(told.ids)} tokens in the cache of {name}, and what is still known",
        f"{dms.resident_tokens:.0f} of {dms.context_tokens:.0f} tokens",
    )


def points(
    found: Counts,
    asked: Mapping[Family, int],
    caches: Mapping[str, Footprint],
    compared: Mapping[str, Fidelity],
    recipe: modelopt_dms.Recipe,
) -> dict[str, Any]:
    """Accuracy and KL as the report draws them."""
    assert recipe.dms is not None
    target = recipe.dms.target_cr
    accuracy = [
        Point(
            method,
            None if method == "full" else target,
            caches[method].compression_ratio,
            family,
            right,
            asked[family],
        )
        for method, counts in found.items()
        for family, right in counts.items()
    ]
    kl = [
        Point("dms", target, x.compression_ratio, text, None, x.tokens, x.kl, x.top1)
        for text, x in compared.items()
    ]
    return {"accuracy": report_points(accuracy), "kl": report_points(kl)}


def ending(output: Path, results: Mapping[str, Any]) -> str:
    """What was done, where it lies, and what to try next."""
    dms, seconds = results["caches"]["dms"], results["seconds"]
    held = f"{dms['resident_tokens']:.0f} of {dms['context_tokens']:.0f} tokens ({dms['compression_ratio']:.1f}x fewer)"
    return f"""
[bold]Done[/bold] in {seconds["total"]:.0f} s, {seconds["compress"]:.0f} of them to compress.
Each head of the cache decided for itself what to forget, before any question was known, and held {held}.
The model's own weights are untouched.

  {output}/report.html    what was forgotten, token by token and head by head: open it in a browser
  {output}/smollm2.png    the same as a picture of one passage
  {output}/results.json   every number above
  {output}/model          the model, for generate, eval, export

Try next:
  modelopt-dms generate {output}/model --prompt "The capital of France is" --max-new-tokens 40 --stats
  modelopt-dms generate {output}/model --cr 2 --stats --prompt "..."      another ratio, without training
  modelopt-dms eval {output}/model --data YOUR.txt --lengths 512,1024 --count 4
"""


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[REAL, "embedded"], default=REAL)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help=f"of {REAL}; by default bfloat16, where the CPU computes it",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe, for example dms.window=32; may be repeated",
    )
    parser.add_argument(
        "--quick", action="store_true", help="less of everything: only proves it runs"
    )
    args = parser.parse_args(argv)
    hf_logging.disable_progress_bar()
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.model == REAL and bring(REAL, console):
        plan = QUICK if args.quick else Plan()
        plan = replace(plan, changes=(*plan.changes, *args.set))
        dtype = args.dtype or ("bfloat16" if computes_bfloat16() else "float32")
        run(REAL, args.output, plan, args.seed, dtype, console)
        return
    small = demo_embedded.QUICK if args.quick else demo_embedded.Plan()
    small = replace(small, changes=(*small.changes, *args.set))
    demo_embedded.run(args.output, small, args.seed, console)


if __name__ == "__main__":
    main()
