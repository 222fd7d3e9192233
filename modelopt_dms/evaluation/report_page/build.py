# SPDX-License-Identifier: Apache-2.0
"""Measures everything that a report shows, within a time limit; returns it as JSON. Draws nothing."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.evaluation.memories import METHODS, Story, is_right, memories
from modelopt_dms.evaluation.plain_twin import NoTwinError, plain_twin
from modelopt_dms.evaluation.report_page.growth import READ, compare_growth
from modelopt_dms.evaluation.report_page.material import Material, material
from modelopt_dms.evaluation.report_page.retention import Retention, retention
from modelopt_dms.evaluation.report_page.tradeoff import (
    Point,
    figures,
    measure_answers,
    measure_kl,
    reachable,
)
from modelopt_dms.gates.gate import gates
from modelopt_dms.gates.thresholds import curve_of
from modelopt_dms.kvcache.hf_cache import kv_stats

FORMAT = 1
PACKAGES = ("modelopt-dms", "torch", "transformers", "nvidia-modelopt", "plotly")
ANSWER = 12  # tokens of an answer
# What steps cost beside the reading of a text, roughly: only the progress bar and its time left depend on it.
TOKEN = 0.04
Advance = Callable[[float], None]


@dataclass(frozen=True)
class ReportPlan:
    """How much a report measures; the parts with 0 are left out.

    Attributes:
        length: tokens of the text and of prompts.
        questions: about the text, answered by every cache.
        prompts: of a family, at every ratio.
        ratios: compression ratios; those that the model's curve does not reach are named among the notes.
        new_tokens: written after the text, with and without eviction.
        minutes: when they are over, the prompts that are left are not asked.
        seed: of prompts and texts.
    """

    length: int = 1024
    questions: int = 5
    prompts: int = 4
    ratios: tuple[float, ...] = (2.0, 4.0, 8.0)
    new_tokens: int = 128
    minutes: float = 10.0
    seed: int = 0


# After `compress`: one reading of a text by each of the caches, and answers; what the curve measured is there already.
BRIEF = ReportPlan(questions=3, prompts=0, new_tokens=0)


@dataclass(frozen=True)
class Origin:
    """What a page says about where it comes from.

    Attributes:
        name: of the model.
        command: that makes the page again.
        recipe: the resolved recipe as YAML, if there is one.
        summary: what `compress` measured, by stage.
        text: file whose start is shown in place of the package's own text, and its token ids.
        peers: rows of a results file of benchmarks/real_models.py.
    """

    name: str
    command: str
    recipe: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    text: tuple[str, list[int]] | None = None
    peers: list[dict[str, Any]] = field(default_factory=list)


class Meter:
    """Time that is spent and left: a bar for who watches, and the limit."""

    def __init__(self, minutes: float, advance: Advance) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.advance = advance

    def step(self, cost: float) -> bool:
        """Count what a step cost, in readings of a text; False if time is up."""
        self.advance(cost)
        return time.monotonic() < self.end


def cost(plan: ReportPlan, settings: int) -> float:
    """What a plan costs in readings of a text, at so many settings of the thresholds; see TOKEN."""
    answers = 2.0 + 4 * plan.questions * ANSWER * TOKEN if plan.questions else 0.0
    prompts = 2 * plan.prompts * (1.0 + settings)
    texts = 2 * (1.5 + 1.5 * settings) if plan.prompts else 0.0
    growth = 2 * (1.0 + plan.new_tokens * TOKEN) if plan.new_tokens else 0.0
    return 1.0 + answers + prompts + texts + growth


def describe(plan: ReportPlan, ratios: Sequence[float | None]) -> str:
    """What will be measured, in a sentence for who waits."""
    parts = [f"one text of {plan.length} tokens"]
    if plan.questions:
        parts.append(f"{plan.questions} questions about it to every cache")
    if plan.prompts:
        shown = ", ".join("as it is" if x is None else f"{x:g}" for x in ratios)
        parts.append(f"{plan.prompts} prompts of two tasks and two texts at CR {shown}")
    if plan.new_tokens:
        parts.append(f"{plan.new_tokens} new tokens with and without eviction")
    return f"{', '.join(parts)}; prompts end after {plan.minutes:g} minutes"


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: ReportPlan,
    origin: Origin,
    advance: Advance = lambda cost: None,
) -> dict[str, Any]:
    """Measure all that the plan says.

    Args:
        model: a DMS model in eval mode. It is left as it is.
        tokenizer: the model's.
        plan: how much.
        origin: what the page says about where it comes from.
        advance: told what each step cost, of `cost` in all.

    Returns:
        What `render.page` draws; JSON. Its "capacity" is None: who plans GPUs puts it in.
    """
    meter = Meter(plan.minutes, advance)
    asked = material(tokenizer, plan.length, plan.seed)
    twin, notes = _twin(model)
    ids, spans, source = asked.told.ids, asked.told.spans, "text with facts, made by the package"
    if origin.text is not None:
        (source, ids), spans = origin.text, []
    kept = retention(model, tokenizer, ids, spans)
    found = start(model, origin, plan, kept, source)
    meter.step(1.0)
    found["answers"] = answers(model, twin, tokenizer, asked.told, plan.questions, meter)
    found |= _tradeoff(model, twin, asked, plan, meter, notes)
    if time.monotonic() > meter.end and plan.prompts:
        notes.append(
            f"Time was up after {plan.minutes:g} minutes: not all of the {plan.prompts} prompts of a task were asked."
        )
    if plan.new_tokens and twin is not None:
        step = _shares(meter, plan, len(ids))
        found["growth"] = compare_growth(model, twin, ids, plan.new_tokens, step)
    return found | {"peers": origin.peers, "notes": notes}


def start(
    model: PreTrainedModel, origin: Origin, plan: ReportPlan, kept: Retention, source: str
) -> dict[str, Any]:
    """A report with a text and nothing else, right after the model has read it; parts are put in by their keys."""
    held = kv_stats(model)
    numbers = (
        "context_tokens",
        "resident_tokens",
        "kv_bytes",
        "dense_bytes",
        "compression_ratio",
    )
    return {
        **about(model, origin, plan),
        "retention": {**kept.figures(), "source": source},
        "cache": {name: getattr(held, name) for name in numbers},
        "answers": None,
        "accuracy": [],
        "kl": [],
        "growth": None,
        "capacity": None,
        "peers": [],
        "notes": [],
    }


def about(model: PreTrainedModel, origin: Origin, plan: ReportPlan) -> dict[str, Any]:
    """What a page says about a model and where it comes from."""
    curve = None
    if getattr(model.config, "dms_curve", None) is not None:
        curve = asdict(curve_of(model))
        del curve["thresholds"]
    return {
        "format": FORMAT,
        "name": origin.name,
        "model": {
            "class": type(model).__name__,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "window": gates(model)[0].window,
            "protect_first": gates(model)[0].protect_first,
            "target_cr": model.config.dms_config["target_cr"],
        },
        "curve": curve,
        "recipe": origin.recipe,
        "summary": origin.summary,
        "plan": asdict(plan),
        "command": origin.command,
        "made": {
            "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
            "machine": processor(model.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    }


def answers(
    model: PreTrainedModel,
    twin: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    told: Story,
    questions: int,
    meter: Meter,
) -> dict[str, Any] | None:
    """What every cache answers to questions about the text."""
    if not questions:
        return None
    held = memories(twin, model, told.ids)
    meter.step(2.0)
    rows = []
    for ask in told.asks[:questions]:
        said = {}
        for method, x in held.items():
            said[method] = x.answer(ask, ANSWER, tokenizer)
            meter.step(ANSWER * TOKEN)
        rows.append({"question": ask.question, "right": ask.right, "answers": said})
    return answer_figures(rows, {method: x.footprint for method, x in held.items()})


def answer_figures(rows: list[dict[str, Any]], held: dict[str, Any]) -> dict[str, Any]:
    """Answers with their verdicts, and what the caches held after the text."""
    for row in rows:
        row["verdicts"] = {k: is_right(said, row["right"]) for k, said in row["answers"].items()}
    return {"methods": {x: METHODS[x] for x in held}, "rows": rows,
            "caches": {k: asdict(x) for k, x in held.items()}}  # fmt: skip


def _tradeoff(
    model: PreTrainedModel,
    twin: PreTrainedModel | None,
    asked: Material,
    plan: ReportPlan,
    meter: Meter,
    notes: list[str],
) -> dict[str, Any]:
    if not plan.prompts:
        return {"accuracy": [], "kl": []}
    ratios, left_out = reachable(model, plan.ratios, plan.length)
    notes += left_out
    texts = asked.texts(plan.length, plan.seed)
    step = 1.5 + 1.5 * len(ratios)
    kl: list[Point] = measure_kl(model, twin, texts, ratios, lambda: meter.step(step))
    where = (plan.length, plan.prompts, plan.seed)
    prompts = {family: asked.prompts(family, *where) for family in asked.families}
    accuracy = measure_answers(
        model, twin, prompts, ratios, plan.length, lambda: meter.step(1.0 + len(ratios))
    )
    return {"accuracy": figures(accuracy), "kl": figures(kl)}


def _shares(meter: Meter, plan: ReportPlan, length: int) -> Callable[[], bool]:
    """A step of `growth`: all of them together cost what `cost` says."""
    steps = -(-length // READ) + plan.new_tokens
    return lambda: meter.step((1.0 + plan.new_tokens * TOKEN) / steps)


def _twin(model: PreTrainedModel) -> tuple[PreTrainedModel | None, list[str]]:
    try:
        return plain_twin(model), []
    except NoTwinError as error:
        return None, [f"No comparison with the full cache and with other methods: {error}."]


def processor(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
