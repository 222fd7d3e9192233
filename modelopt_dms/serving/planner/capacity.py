# SPDX-License-Identifier: Apache-2.0
"""A plan: what fits on a GPU and how fast it decodes at best, dense and with DMS, by KV format and number of GPUs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modelopt_dms.serving.planner.hardware import Gpu, gpu_of
from modelopt_dms.serving.planner.limit import (
    cache_bytes,
    can_split,
    check_split,
    decode_step,
    weight_bytes,
)
from modelopt_dms.serving.planner.model_shape import ModelShape, PlanError, shape_of
from modelopt_dms.serving.planner.plan_recipe import (
    Planned,
    Retention,
    Rows,
    kv_rows,
    planned_by_config,
    planned_by_recipe,
    weight_bits,
)

NOTE = (
    "A model, not a measurement: published memory and bandwidth, every sequence at its full context, no communication "
    "between GPUs, nothing else in the way (docs/capacity.md)."
)
LONGEST, MOST_GPUS = 2**24, 64
USUAL_GPUS = (1, 2, 4, 8)
_PLAIN = (Rows(), Rows())
_FORMATS = {"FP8": (Rows("fp8"), Rows("fp8")), "NVFP4": (Rows("nvfp4"), Rows("nvfp4"))}


@dataclass(frozen=True)
class Variant:
    """One way to serve a model.

    Attributes:
        name: for readers.
        planned: what is done to weights; None: they are as they were.
        retention: which tokens stay; None: all.
        rows: how keys and values are stored.
    """

    name: str
    planned: Planned | None
    retention: Retention | None
    rows: tuple[Rows, Rows]


@dataclass(frozen=True)
class PlanRow:
    """A variant on a number of GPUs. Bytes are of one GPU; speeds are of all together.

    Attributes:
        variant: its name.
        tp: GPUs that share the model (tensor parallel).
        weight_bytes: of the weights.
        kv_bytes: of one sequence's pages at full context, with rings and tables.
        reserved_bytes: of the pages that `graphed` reserves for it from the start.
        resident_tokens: of a KV head.
        compression_ratio: context over resident tokens.
        sequences: that fit at once, if pages are given out as lists grow.
        sequences_reserved: that fit if every sequence's pages are reserved from the start.
        batch: sequences that the speed is for: those that fit, or as many as were asked for.
        step_ms: milliseconds of a decode step; None if the batch does not fit.
        tokens_per_second: of the batch.
        times_dense: tokens_per_second over the dense variant's on as many GPUs.
    """

    variant: str
    tp: int
    weight_bytes: int
    kv_bytes: int
    reserved_bytes: int
    resident_tokens: float
    compression_ratio: float
    sequences: int
    sequences_reserved: int
    batch: int
    step_ms: float | None
    tokens_per_second: float
    times_dense: float | None


@dataclass(frozen=True)
class Plan:
    """What was asked, and a row for each variant and number of GPUs.

    Attributes:
        model: name.
        gpu: name in full.
        gpu_source: where its figures come from.
        context: tokens of every sequence.
        memory_utilization: share of a GPU's memory for weights and KV caches.
        recipe: what DMS and formats follow.
        parameters: of the model.
        evicted_share: of the evictable tokens.
        ratios: where the compression ratios of the rows come from; empty without DMS.
        note: what this is not, and what to look out for.
        rows: by number of GPUs, then variant.
    """

    model: str
    gpu: str
    gpu_source: str
    context: int
    memory_utilization: float
    recipe: str
    parameters: int
    evicted_share: float
    ratios: str
    note: str
    rows: tuple[PlanRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {"kind": "model, not a measurement"} | asdict(self)


def plan(
    model: str,
    gpu: str = "h200",
    context: int = 32768,
    recipe: str | None = None,
    *,
    tp: Sequence[int] | None = None,
    batch: int | None = None,
    memory_utilization: float = 0.9,
) -> Plan:
    """Sequences that fit on GPUs and tokens per second at best, for a model dense and with DMS. Runs nothing.

    Args:
        model: a config.json, a directory, a .gguf file, a name of the shipped table ("Qwen3-8B"), a fetched model
            ("smollm2"), or a hub id in the local cache. A compressed model's own ratio and formats are taken.
        gpu: "h200", "h100", "b200", "a100" or "l40s".
        context: tokens of every sequence, prompt and answer.
        recipe: name or file; "calibrated_cr8" unless the model is compressed already.
        tp: numbers of GPUs that share the model; by default those of 1, 2, 4, 8 that share its heads evenly.
        batch: sequences at a time; by default as many as fit.
        memory_utilization: share of a GPU's memory for weights and KV caches; the rest is for activations and CUDA.

    Raises:
        PlanError: an unknown model or GPU, numbers out of range, or GPUs that cannot share the heads.
        RecipeError: an unknown recipe.
    """
    return plan_shape(
        shape_of(model),
        gpu_of(gpu),
        context,
        recipe,
        tp=tp,
        batch=batch,
        memory_utilization=memory_utilization,
    )


def plan_shape(
    shape: ModelShape,
    gpu: Gpu,
    context: int,
    recipe: str | None,
    *,
    tp: Sequence[int] | None,
    batch: int | None,
    memory_utilization: float,
) -> Plan:
    """As `plan`, for a shape and a GPU."""
    if tp is None:
        tp = [x for x in USUAL_GPUS if can_split(shape, x)]
    _check(context, tp, batch, memory_utilization)
    for count in tp:
        check_split(shape, count)
    planned = _planned(shape, recipe)
    how: Any = {"tp": tp, "batch": batch, "memory_utilization": memory_utilization}
    return plan_as(shape, planned, gpu, context, **how)


def plan_as(
    shape: ModelShape,
    planned: Planned,
    gpu: Gpu,
    context: int,
    *,
    tp: Sequence[int],
    batch: int | None,
    memory_utilization: float,
) -> Plan:
    """As `plan_shape`, for what is done to the model."""
    rows: list[PlanRow] = []
    for count in dict.fromkeys(tp):
        room = gpu.memory * 1e9 * memory_utilization
        found = [_row(shape, x, gpu, context, count, room, batch) for x in _variants(planned)]
        dense = next(x for x in found if x.variant == "dense").tokens_per_second
        rows += [_beside(x, dense) for x in found]
    kept = planned.retention
    return Plan(
        model=shape.name,
        gpu=gpu.title,
        gpu_source=gpu.source,
        context=context,
        memory_utilization=memory_utilization,
        recipe=planned.name,
        parameters=shape.parameters,
        evicted_share=0.0 if kept is None else kept.evicted_share(),
        ratios="" if kept is None else kept.explain(context),
        note=_note(shape, context),
        rows=tuple(rows),
    )


def _note(shape: ModelShape, context: int) -> str:
    if shape.max_length is None or context <= shape.max_length:
        return NOTE
    return f"{NOTE} {shape.name} was made for {shape.max_length:,} tokens, fewer than this context."


def _planned(shape: ModelShape, recipe: str | None) -> Planned:
    if shape.dms:
        if recipe is not None:
            raise PlanError(
                f"{shape.name} is compressed already; leave --recipe out, or give the original model"
            )
        return planned_by_config(shape.name, shape.dms, shape.shift)
    return planned_by_recipe(recipe or "calibrated_cr8")


def _variants(planned: Planned) -> list[Variant]:
    """Dense and DMS; all with the recipe's weights, so that they differ by their caches alone, and one as it was."""
    found = [Variant("dense", planned, None, _PLAIN)]
    if any(
        weight_bits(planned, x) for x in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.up_proj")
    ):
        found.insert(0, Variant("dense, plain weights", None, None, _PLAIN))
    own = kv_rows(planned)
    if planned.retention is None:
        return (
            found
            if own == _PLAIN
            else [*found, Variant(f"dense, {_named(own)} KV", planned, None, own)]
        )
    cr = f"DMS {planned.retention.target_cr:.3g}x"
    formats: dict[str, tuple[Rows, Rows]] = {cr: _PLAIN}
    formats |= {f"{cr}, {name}": rows for name, rows in _FORMATS.items()}
    if own not in formats.values():
        formats[f"{cr}, {_named(own)}"] = own
    marked = {f"{name} *" if rows == own else name: rows for name, rows in formats.items()}
    return found + [Variant(name, planned, planned.retention, x) for name, x in marked.items()]


def _named(rows: tuple[Rows, Rows]) -> str:
    names = [x.number.upper() + (" a row" if x.per_row else "") for x in rows]
    return names[0] if names[0] == names[1] else f"{names[0]} and {names[1]}"


def _row(
    shape: ModelShape,
    variant: Variant,
    gpu: Gpu,
    context: int,
    tp: int,
    room: float,
    asked: int | None,
) -> PlanRow:
    cache = cache_bytes(shape, variant.rows, variant.retention, context, tp)
    weights = weight_bytes(shape, variant.planned) / tp
    free = max(0.0, room - weights)
    fit = int(free / cache.kv)
    batch = fit if asked is None else asked
    seconds = None
    if 0 < batch <= fit:
        seconds = decode_step(shape, variant.planned, variant.rows, cache, batch, gpu, tp).seconds
    return PlanRow(
        variant=variant.name,
        tp=tp,
        weight_bytes=round(weights),
        kv_bytes=round(cache.kv),
        reserved_bytes=round(cache.reserved),
        resident_tokens=round(cache.tokens, 1),
        compression_ratio=round(context / cache.tokens, 3),
        sequences=fit,
        sequences_reserved=int(free / (cache.reserved + cache.bookkeeping)),
        batch=batch,
        step_ms=None if seconds is None else round(seconds * 1e3, 3),
        tokens_per_second=0.0 if seconds is None else round(batch / seconds, 1),
        times_dense=None,
    )


def _beside(row: PlanRow, dense: float) -> PlanRow:
    times = round(row.tokens_per_second / dense, 2) if dense and row.tokens_per_second else None
    return PlanRow(**{**asdict(row), "times_dense": times})


def _check(context: int, tp: Sequence[int], batch: int | None, memory_utilization: float) -> None:
    if not 1 <= context <= LONGEST:
        raise PlanError(f"--context {context} must be 1 to {LONGEST} tokens")
    if not tp or any(not 1 <= x <= MOST_GPUS for x in tp):
        raise PlanError(
            f"--tp {', '.join(map(str, tp)) or 'nothing'} must be numbers of 1 to {MOST_GPUS} GPUs"
        )
    if batch is not None and batch < 1:
        raise PlanError(f"--batch {batch} must be at least 1")
    if not 0.0 < memory_utilization <= 1.0:
        raise PlanError(f"--memory-utilization {memory_utilization} must be above 0 and at most 1")
