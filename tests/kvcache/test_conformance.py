# SPDX-License-Identifier: Apache-2.0
"""Every `LayerCache` against one model in plain Python: the same rows in the same slots after any history.

The model is `cache_model.ListModel`, one for each (sequence, KV head). Since all implementations equal it, they equal
each other.
"""

from copy import deepcopy

import hypothesis.strategies as st
import pytest
import torch
from cache_model import ListModel
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from onnx_node import numbers, run
from paged_oracle import FORMATS, Formats, stored
from torch import Tensor

from modelopt_dms.kernels.append_reference import plan_pack, update_metadata
from modelopt_dms.kernels.gating import GateInput
from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kernels.number_formats import Fp8
from modelopt_dms.kernels.rollback import LONGEST_DRAFT
from modelopt_dms.kvcache.head_caches import HeadCaches
from modelopt_dms.kvcache.layer_cache import LayerCache
from modelopt_dms.kvcache.page_pool import SharedPool
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches

CPU = torch.device("cpu")
K, D = 2, 16


class EncodingHeadCaches(HeadCaches):
    """HeadCaches, whose callers encode rows."""

    def __init__(self, window: int, shift: int, formats: Formats) -> None:
        super().__init__(window, shift)
        self.formats = formats

    def append(self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor | None) -> None:
        k, v = (stored(form, x) for form, x in zip(self.formats, (k, v), strict=True))
        super().append(k, v, decisions, valid)


class OnnxCaches(PagedHeadCaches):
    """The ops' bodies in ONNX: all pages are in the table already, and what changes is returned."""

    def prepare(self, k: Tensor, v: Tensor) -> None:
        new = not hasattr(self, "state")
        super().prepare(k, v)
        if new:
            table = self.state.table
            wanted = torch.ones(table.numel(), dtype=torch.bool)
            table.copy_(self.pool.take(wanted).view_as(table))

    def append_token(
        self, k: Tensor, v: Tensor, gate: GateInput, valid: Tensor | None = None
    ) -> None:
        attributes = {"window": self.window, "shift": self.shift}
        changed = self._run("DmsCacheUpdate", {"k": k, "v": v, "evict": gate.decide(K)}, attributes)
        for name in ("live", "seen", "ring_slot", "ring_evict"):
            getattr(self.state, name).copy_(changed[f"new_{name}"])
        self.seen += 1

    def _append_many(self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor | None) -> None:
        plan = plan_pack(decisions, valid, self.state, shrinks=False)
        self._run("DmsPrefillWrite", {"k": k, "v": v, "slots": plan.slots}, {})
        update_metadata(plan, self.state)
        self.seen += k.shape[2]
        if valid is not None:
            self.padding += (~valid).sum(-1)

    def _run(
        self, name: str, given: dict[str, Tensor], attributes: dict[str, int]
    ) -> dict[str, Tensor]:
        pools = {"keys": self.pool.keys, "values": self.pool.values}
        signed = {x: y.view(torch.int8) if y.element_size() == 1 else y for x, y in pools.items()}
        given = given | vars(self.state) | signed
        changed = run(name, given, **attributes, **numbers(self.formats))
        for x, y in pools.items():
            y.copy_(changed[f"new_{x}"].view(y.dtype))
        return changed


KINDS = ("lists", "reference", "triton", "onnx")


def empty_caches(
    kind: str, window: int, shift: int, formats: Formats, layers: int
) -> list[LayerCache]:
    """Layers of one cache; only those with pages share anything, so that there is one of the others."""
    if kind == "lists":
        return [EncodingHeadCaches(window, shift, formats)]
    if kind == "onnx":
        shared = SharedPool(CPU, "reference", width=6, max_bytes=1 << 20)
        return [OnnxCaches(window, shift, shared, formats)]
    shared = SharedPool(CPU, kind, layers=layers)
    return [PagedHeadCaches(window, shift, shared, formats) for _ in range(layers)]


class Histories:
    """Caches of one kind and their models, which take in the same tokens.

    Attributes:
        caches: layers of one cache.
        models: of each layer, one for each list.
        stored: of each layer, the key row and the value row of every token ever given.
        active: which sequences take in tokens.
    """

    def __init__(
        self,
        kind: str,
        window: int,
        shift: int,
        name: str,
        *,
        rollback: int,
        batch: int,
        layers: int = 1,
        seed: int = 0,
    ) -> None:
        self.kind, self.formats = kind, FORMATS[name]
        self.dtype = torch.float32 if kind == "onnx" else torch.bfloat16
        self.generator = torch.Generator().manual_seed(seed)
        self.caches = empty_caches(kind, window, shift, self.formats, layers)
        self.models = [
            [ListModel(window, shift) for _ in range(batch * K)] for _ in range(len(self.caches))
        ]
        self.stored: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.caches]
        self.active = [True] * batch
        self.seen = 0
        self.record(rollback)

    @property
    def batch(self) -> int:
        return len(self.active)

    @property
    def recoverable(self) -> int:
        return min(len(model.before) for model in self.models[0])

    def record(self, rollback: int) -> None:
        for cache in self.caches:
            cache.rollback = rollback

    def append(
        self, T: int, rate: float = 0.5, padding: float = 0.0, announced: bool = False
    ) -> None:
        if self.kind == "onnx" and self.seen:
            padding = 0.0  # a graph takes it before the first token only
        valid = self._random(self.batch, T) >= padding
        for layer, cache in enumerate(self.caches):
            k, v = (
                torch.randn(self.batch, K, T, D, generator=self.generator).to(self.dtype)
                for _ in range(2)
            )
            evict = self._random(self.batch, K, T) < rate
            if announced and self.seen:  # as attention over the past needs it
                cache.decide_previous(evict[..., 0])
            cache.append(k, v, evict, valid if padding else None)
            first = len(self.stored[layer])
            rows = [stored(x, y).flatten(0, 2) for x, y in zip(self.formats, (k, v), strict=True)]
            self.stored[layer] += zip(*rows, strict=True)
            for i, model in enumerate(self.models[layer]):
                if self.active[i // K]:
                    tokens = list(range(first + i * T, first + (i + 1) * T))
                    decisions = evict.flatten(0, 1)[i].tolist()
                    model.append(tokens, decisions, valid[i // K].tolist(), cache.rollback)
        self.seen += T

    def decode(self, steps: int, rate: float = 0.5) -> None:
        for _ in range(steps):
            self.append(1, rate)

    def pause(self, active: list[bool]) -> None:
        """Only these sequences go on; not of lists, which have no such thing."""
        for cache in self.caches:
            if isinstance(cache, PagedHeadCaches):
                cache.shared.active.copy_(torch.tensor(active))
                self.active = active

    def select(self, sequences: list[int]) -> None:
        self.pause([True] * self.batch)
        for layer, cache in enumerate(self.caches):
            cache.select(torch.tensor(sequences))
            for model in self.models[layer]:
                model.before = []
            self.models[layer] = [
                deepcopy(self.models[layer][b * K + h]) for b in sequences for h in range(K)
            ]
        self.active = [True] * len(sequences)

    def crop(self, tokens: int) -> None:
        for layer, cache in enumerate(self.caches):
            cache.crop(tokens)
            for i, model in enumerate(self.models[layer]):
                if self.active[i // K]:
                    model.crop(tokens)
        self.seen -= tokens

    def check(self) -> None:
        for layer, (cache, models) in enumerate(zip(self.caches, self.models, strict=True)):
            cache.check_integrity()
            assert cache.seen == self.seen
            assert (cache.B, cache.K, cache.lists) == (self.batch, K, len(models))
            live = [len(model.slots) for model in models]
            usage = cache.usage.synchronized()
            assert cache.live.flatten().tolist() == usage.live.flatten().tolist() == live
            assert usage.tokens.tolist() == [len(model.tokens) for model in models[::K]]
            for i, model in enumerate(models):
                self._check_list(cache, i, model, self.stored[layer])
            if isinstance(cache, PagedHeadCaches):
                cache.shared.check()

    def _check_list(
        self, cache: LayerCache, index: int, model: ListModel, all_rows: list[tuple[Tensor, Tensor]]
    ) -> None:
        tokens = [token for _, token in model.slots]
        assert sorted(tokens) == sorted(model.held())
        for side, rows in enumerate(cache.rows(index)):
            assert len(rows) == len(tokens)
            if tokens:
                expected = torch.stack([all_rows[x][side] for x in tokens])
                if isinstance(cache, OnnxCaches) and isinstance(self.formats[side], Fp8):
                    rows, expected = (x.masked_fill(x == 0x80, 0) for x in (rows, expected))  # -0
                assert torch.equal(rows, expected)
        positions, slots = (x.tolist() for x in cache.pending(index))
        assert sorted(zip(positions, slots, strict=True)) == model.pending()

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)


class AnyHistory(RuleBasedStateMachine):
    """Chunks, padding, beams, rollbacks and sequences that stand still, in any order."""

    kind = "lists"
    names = sorted(FORMATS)
    windows = [0, 1, 2, 5, 9]

    @initialize(
        data=st.data(),
        shift=st.integers(0, 1),
        rollbacks=st.sampled_from([(0, 0), (0, 5), (2, 2), (6, 24)]),
        batch=st.integers(1, 3),
        T=st.one_of(st.integers(1, 12), st.integers(1, 90)),
        padding=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 999),
    )
    def start(
        self,
        data: st.DataObject,
        shift: int,
        rollbacks: tuple[int, int],
        batch: int,
        T: int,
        padding: float,
        seed: int,
    ) -> None:
        window = data.draw(st.sampled_from(self.windows), label="window")
        name = data.draw(st.sampled_from(self.names), label="name")
        first, later = (0, 0) if self.kind == "onnx" else rollbacks
        self.histories = Histories(
            self.kind, window, shift, name, rollback=first, batch=batch, layers=2, seed=seed
        )
        self.histories.append(T, 0.6, padding)
        self.histories.record(later)

    @rule(
        T=st.one_of(st.just(1), st.integers(2, 12)),
        rate=st.sampled_from([0.0, 0.5, 1.0]),
        padding=st.sampled_from([0.0, 0.0, 0.6, 1.0]),
        announced=st.booleans(),
    )
    def append(self, T: int, rate: float, padding: float, announced: bool) -> None:
        self.histories.append(T, rate, padding, announced)

    @rule(steps=st.integers(1, 14), rate=st.sampled_from([0.3, 1.0]))
    def decode(self, steps: int, rate: float) -> None:
        self.histories.decode(steps, rate)

    @precondition(lambda self: self.kind != "lists")
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        size = self.histories.batch
        active = st.lists(st.booleans(), min_size=size, max_size=size)
        self.histories.pause(data.draw(active, label="active"))

    @precondition(lambda self: self.kind != "onnx")
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        names = st.lists(st.integers(0, self.histories.batch - 1), min_size=1, max_size=4)
        self.histories.select(data.draw(names, label="sequences"))

    @precondition(lambda self: self.histories.recoverable)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        tokens = data.draw(st.integers(1, self.histories.recoverable), label="tokens")
        self.histories.crop(tokens)

    @rule(excess=st.integers(1, 9))
    def crop_too_much(self, excess: int) -> None:
        tokens = self.histories.seen + excess
        with pytest.raises(ValueError, match=f"cannot take back {tokens} tokens.*activate_past"):
            self.histories.caches[0].crop(tokens)

    @invariant()
    def holds_what_the_models_hold(self) -> None:
        if hasattr(self, "histories"):
            self.histories.check()


def any_history(kind: str, examples: int, steps: int, **options: object) -> type:
    machine = type(f"AnyHistoryOf{kind.title()}", (AnyHistory,), {"kind": kind, **options})
    machine.TestCase.settings = settings(
        max_examples=examples, stateful_step_count=steps, derandomize=True
    )
    return machine.TestCase


test_lists = any_history("lists", 40, 10)
test_paged_reference = any_history("reference", 20, 8)
test_paged_triton = any_history("triton", 3, 4)
test_onnx_bodies = any_history("onnx", 5, 4, names=["plain", "fp8", "int8"], windows=[0, 3])

# Window, shift, number format, tokens that can be taken back, and what happens.
SCRIPTS = {
    "a chunk ends before a page": (4, 0, "plain", 0, [("append", PAGE - 1, 0.3), ("decode", 2)]),
    "a chunk ends with a page": (4, 1, "plain", 0, [("append", PAGE, 0.3), ("decode", 2)]),
    "a chunk ends behind a page": (4, 0, "int8", 0, [("append", PAGE + 1, 0.3), ("decode", 2)]),
    "no window": (0, 0, "plain", 0, [("decode", 5), ("pause", [True, False]), ("decode", 2)]),
    "no window, shifted": (0, 1, "fp8", 0, [("append", 3), ("decode", 5)]),
    "all is evicted": (3, 0, "plain", 0, [("decode", 12, 1.0)]),
    "a window longer than the text": (100, 1, "plain", 0, [("append", 9, 1.0), ("decode", 3)]),
    "padding shrinks lists": (
        *(6, 1, "fp8 rows", 0),
        [("append", 12, 1.0), ("append", 4, 0.5, 0.6), ("append", 3, 1.0), ("append", 3, 0.5, 1.0)],
    ),
    "a draft is taken back": (
        *(3, 0, "fp8 rows", 6),
        [("decode", 8, 0.7), ("pause", [True, False]), ("crop", 4), ("decode", 4, 0.7)],
    ),
    "a draft is taken back, shifted": (
        *(3, 1, "nvfp4", 6),
        [("append", 6, 0.7), ("crop", 6), ("append", 5, 0.7), ("crop", 2), ("decode", 2, 0.7)],
    ),
    "a long draft is taken back": (
        *(4, 0, "plain", 24),
        [("append", 100), ("append", LONGEST_DRAFT), ("crop", LONGEST_DRAFT), ("decode", 2)],
    ),
    "beams": (2, 1, "mixed", 0, [("append", 9), ("select", [1, 1, 0, 1]), ("decode", 3)]),
}


def can_run(kind: str, script: str) -> bool:
    _, _, name, rollback, steps = SCRIPTS[script]
    if kind == "onnx":
        return name in ("plain", "fp8", "int8") and not rollback
    # Interpreted kernels are slow, and a short draft makes them do the same.
    return kind != "triton" or ("append", LONGEST_DRAFT) not in steps


@pytest.mark.parametrize(
    ("kind", "script"), [(x, y) for x in KINDS for y in SCRIPTS if can_run(x, y)]
)
def test_script(kind: str, script: str) -> None:
    window, shift, name, rollback, steps = SCRIPTS[script]
    histories = Histories(kind, window, shift, name, rollback=rollback, batch=2)
    for method, *arguments in steps:
        getattr(histories, method)(*arguments)
        histories.check()
