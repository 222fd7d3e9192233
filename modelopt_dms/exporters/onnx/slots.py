# SPDX-License-Identifier: Apache-2.0
"""A layer's slots as tensors of a graph: `kvcache.paged_head_caches.PagedHeadCaches` with nodes of our ops for kernels.

Shapes as in `runtime.operators`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modelopt_dms.exporters.onnx.nodes import call
from modelopt_dms.kernels.append_reference import plan_pack
from modelopt_dms.kernels.layout import PAGE, PageTables
from modelopt_dms.kernels.prefill_reference import expiry, log2_bias
from modelopt_dms.kernels.reference import Scoring, hard_keep_logprob
from modelopt_dms.kernels.rollback import decide_previous
from modelopt_dms.kvcache.hf_cache import DMSLayer, LayerStep
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches
from modelopt_dms.runtime import operators
from modelopt_dms.runtime.state import POOLS, SMALL

# Tensors of a layer that go through a graph, in its order; the table of pages only goes in.
STATE = (*POOLS, *SMALL)
CHANGED = tuple(x for x in STATE if x != "table")


@dataclass(frozen=True)
class SlotFormat:
    """What is the same for all layers of a model.

    Attributes:
        window: W.
        shift: 1 if a token's decision governs the token before it.
        key_number: "plain", "fp8" or "int8".
        value_number: likewise.
        programs: that share a decode step's tiles.
        rows: query heads of a KV head, as the decode kernel stores them.
    """

    window: int
    shift: int
    key_number: str
    value_number: str
    programs: int
    rows: int

    @property
    def formats(self) -> dict[str, str]:
        """As attributes."""
        return {"key_number": self.key_number, "value_number": self.value_number}


class GraphSlots(PagedHeadCaches):
    """One layer's slots while a graph is traced.

    Attributes:
        tensors: the layer's, by name; after a step, their next values.
        scales: [4, K] float32, see `kernels.layout.PageTables`.
        active: [B] bool; decode only.
        chunk_padding: [B] int32, tokens on the left of the chunk that are padding; prefill only.
    """

    def __init__(
        self,
        form: SlotFormat,
        state: dict[str, Tensor],
        scales: Tensor,
        active: Tensor | None,
        padding: Tensor | None,
    ) -> None:
        self.window, self.shift = form.window, form.shift
        self.form = form
        self.tensors = dict(state)
        self.scales = scales
        self.active = active
        self.chunk_padding = padding
        self.seen = 0  # positions come in as a tensor; what asks for a number gets none
        self.usage = None  # type: ignore[assignment]

    def attend(self, step: LayerStep, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention [B, H, T, DV] of the new tokens, and the layer's next state.

        Args:
            step: what the layer's hooks staged.
            q: queries [B, H, T, D].
            k: keys [B, K, T, D], as they will be read from the cache.
            v: values [B, K, T, DV], likewise.
            scoring: scale and softcap.
        """
        assert step.layer is not None
        rows = step.layer.take_incoming()
        scored = {"scale": scoring.scale, "softcap": scoring.softcap or 0.0}
        if self.active is not None:
            return self._decode(step, q, rows, scored)
        return self._prefill(step, q, (k, v), rows, scored)

    def _decode(
        self, step: LayerStep, q: Tensor, rows: tuple[Tensor, Tensor], scored: dict[str, float]
    ) -> Tensor:
        form, state = self.form, self.tensors
        assert step.undecided is not None
        k, v = (x[:, :, 0] for x in rows)
        evict = step.undecided.decide(k.shape[1]).expand(-1, k.shape[1])
        given = {"k": k, "v": v, "evict": evict, "active": self.active, "scales": self.scales}
        changed = call(
            operators.CACHE_UPDATE,
            {**given, **state},  # type: ignore[dict-item]
            window=form.window,
            shift=form.shift,
            **form.formats,
        )
        state |= {name: changed[f"new_{name}"] for name in CHANGED}
        read = {name: state[name] for name in ("keys", "values", "table", "live")}
        parts = call(
            operators.DECODE_PARTIAL,
            {"q": q[:, :, 0], "scales": self.scales, **read},
            programs=form.programs,
            rows=form.rows,
            value_dim=v.shape[-1],
            **scored,
            **form.formats,
        )
        out = call(operators.DECODE_COMBINE, {**parts, "live": state["live"]})["out"]
        return out[:, :, None]

    def _prefill(
        self,
        step: LayerStep,
        q: Tensor,
        own: tuple[Tensor, Tensor],
        rows: tuple[Tensor, Tensor],
        scored: dict[str, float],
    ) -> Tensor:
        form, state = self.form, self.tensors
        assert step.evict is not None
        k, v = own
        K, T = k.shape[1:3]
        evict = step.evict.expand(-1, K, -1)
        lists = self._lists(q.shape[0])
        decide_previous(lists, evict[..., 0])
        tokens = torch.arange(T, dtype=torch.int32, device=q.device)
        assert self.chunk_padding is not None
        padding = self.chunk_padding[:, None]
        valid = tokens >= padding  # [B, T]
        # Without padding, -1: a query sees what was before the chunk.
        starts = torch.where(padding > 0, padding, -1)
        starts = torch.where(valid, starts, tokens).to(torch.int32)
        length = lists.table.shape[2] * PAGE
        read = call(
            operators.PREFILL_ATTENTION,
            {
                "q": q,
                "k": k,
                "v": v,
                "bias": log2_bias(hard_keep_logprob(step.evict, self.shift).expand(-1, K, -1)),
                "starts": starts,
                "first": lists.seen[:, 0],
                "expiry": expiry(lists, length),
                "scales": self.scales,
                **{name: state[name] for name in ("keys", "values", "table", "live")},
            },
            window=form.window,
            **scored,
            **form.formats,
        )
        # Padding comes on empty lists only, so that none can shrink.
        plan = plan_pack(evict, valid, lists, shrinks=False)
        written = call(
            operators.PREFILL_WRITE,
            {
                "k": rows[0],
                "v": rows[1],
                "slots": plan.slots,
                "scales": self.scales,
                "table": state["table"],
                "keys": read["same_keys"],
                "values": read["same_values"],
            },
            **form.formats,
        )
        self.tensors = {
            **state,
            "keys": written["new_keys"],
            "values": written["new_values"],
            "live": plan.live,
            "seen": lists.seen + T,
            "ring_slot": plan.ring_slot,
            "ring_evict": plan.ring_evict,
        }
        return read["out"]

    def _lists(self, batch: int) -> PageTables:
        """The state as the reference knows it, on tensors that may be changed."""
        held = {name: self.tensors[name] for name in SMALL}
        active = torch.ones(batch, dtype=torch.bool, device=self.scales.device)
        lists = PageTables(
            self.window, self.shift, **held, active=active, formats=(None, None), scales=self.scales
        )
        return replace(lists, ring_evict=lists.ring_evict.clone()) if self.shift else lists


class GraphLayer(DMSLayer):
    """A cache layer of a graph: rows go to attention as they are, and to pages as they are."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """See `DMSLayer.update`."""
        self._incoming = (key_states, value_states)
        return key_states, value_states
