# SPDX-License-Identifier: Apache-2.0
"""A tiny attention model that follows the contract of the exported graphs, token by token; and what runs it.

Knows `kernels.append_reference` and nothing of the runtime but the manifest. Slow and plain: it is what sessions are
compared with. It fails where a list needs a page that the host did not give it.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from modelopt_dms.kernels.append_reference import append_token
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.runtime.manifest import Manifest, Model, Phase, Port
from modelopt_dms.runtime.state import State

L, K, H, D, DV, V = 2, 2, 4, 8, 6, 41
SMALL = ("live", "seen", "ring_slot", "ring_evict")


def toy_manifest(
    *,
    chunk: int = 8,
    pages_per_list: int = 4,
    window: int = 3,
    shift: int = 0,
    in_place: bool = True,
    eos: tuple[int, ...] = (),
    dtype: str = "float32",
) -> Manifest:
    """A manifest; `in_place` False is a plugin-free graph, whose outputs are all tensors of their own."""
    model = Model("ToyForCausalLM", L, K, H, D, DV, V, dtype, window, shift, "plain", "plain", eos)
    R, P = window + 1, pages_per_list
    kinds: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "keys": (dtype, ("pages", PAGE, D)),
        "values": (dtype, ("pages", PAGE, DV)),
        "table": ("int32", ("batch", K, P)),
        "live": ("int32", ("batch", K)),
        "seen": ("int32", ("batch", K)),
        "ring_slot": ("int32", ("batch", K, R)),
        "ring_evict": ("bool", ("batch", K, R)),
    }

    def phase(name: str, feeds: tuple[Port, ...]) -> Phase:
        state = tuple(Port(f"{kind}.{i}", *form) for i in range(L) for kind, form in kinds.items())
        outputs = [Port("logits", "float32", ("batch", V))]
        for x in state:
            kind = x.name.partition(".")[0]
            if kind != "table":
                same = in_place and (name == "decode" or kind in ("keys", "values"))
                aliases = x.name if same else None
                outputs.append(Port(f"new_{x.name}", x.dtype, x.shape, aliases, x.name))
        return Phase(f"{name}.onnx", (*feeds, *state), tuple(outputs))

    def ids(tokens: int) -> tuple[Port, ...]:
        return tuple(Port(x, "int64", ("batch", tokens)) for x in ("input_ids", "positions"))

    phases = {
        "decode": phase("decode", (*ids(1), Port("active", "bool", ("batch",)))),
        "prefill": phase("prefill", (*ids(chunk), Port("padding", "int32", ("batch",)))),
    }
    return Manifest(model, PAGE, P, chunk, 4, phases, plugin_free=not in_place)


class ToyGraphs:
    """Both graphs of the model: take tensors by name, change those in place that the manifest says, give the rest."""

    def __init__(self, manifest: Manifest, seed: int = 0) -> None:
        self.manifest = manifest
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) / shape[0] ** 0.5

        C = 16
        self.embedding = weight(V, C) * V**0.5
        self.head = weight(C, V)
        self.place = torch.rand(C, generator=generator) * 2
        self.layers = [
            (weight(C, H * D), weight(C, K * D), weight(C, K * DV), weight(C, K), weight(H * DV, C))
            for _ in range(L)
        ]

    def __call__(self, phase: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.manifest.phases[phase].outputs
        own = {x.state for x in outputs if x.aliases is None and x.state is not None}
        state = {name: x.clone() if name in own else x for name, x in tensors.items()}
        ids, positions = tensors["input_ids"], tensors["positions"]
        for t in range(ids.shape[1]):
            if phase == "decode":
                active = tensors["active"].clone()
            else:
                active = t >= tensors["padding"]
                self._pad(state, active)
            logits = self._token(ids[:, t], positions[:, t], active, state)
        given = {x.name: state[x.state] for x in outputs if x.state in own}
        return {"logits": logits, **given}

    def _pad(self, state: dict[str, Tensor], active: Tensor) -> None:
        for i in range(L):
            assert (state[f"live.{i}"][~active] == 0).all(), (
                "padding before a list that is not empty"
            )
            state[f"seen.{i}"] += (~active[:, None]).int()

    def _token(
        self, ids: Tensor, positions: Tensor, active: Tensor, state: dict[str, Tensor]
    ) -> Tensor:
        h = self.embedding[ids] + torch.sin(positions[:, None] * self.place)
        for i, (wq, wk, wv, wg, wo) in enumerate(self.layers):
            lists, pool = self._lists(i, active, state)
            q, k, v = ((h @ w).unflatten(1, (n, -1)) for w, n in ((wq, H), (wk, K), (wv, K)))
            append_token(k, v, Decided(h @ wg > 0), pool, lists)
            assert int(pool.counters[1]) >= 0, "a list needs a page that the host did not reserve"
            h = torch.tanh(h + attend(q, pool, lists) @ wo)
        return (h @ self.head).float()

    def _lists(
        self, i: int, active: Tensor, state: dict[str, Tensor]
    ) -> tuple[PageTables, PagePool]:
        """A layer's lists over the very tensors of the state, and a pool that has no page to give."""
        small = {x: state[f"{x}.{i}"] for x in ("table", *SMALL)}
        model = self.manifest.model
        lists = PageTables(
            model.window,
            model.shift,
            **small,
            active=active,
            formats=(None, None),
            scales=torch.ones(4, K),
        )
        keys, values = state[f"keys.{i}"], state[f"values.{i}"]
        layouts = (RowLayout("plain", D, keys.dtype), RowLayout("plain", DV, values.dtype))
        none = torch.zeros(1, dtype=torch.int32)
        pool = PagePool(*layouts, keys, values, None, None, none, torch.zeros(2, dtype=torch.int32))
        return lists, pool


def attend(q: Tensor, pool: PagePool, lists: PageTables) -> Tensor:
    """Attention [B, H * DV] of q [B, H, D] over the live slots."""
    E = lists.table.shape[2] * PAGE
    slots = torch.arange(E).expand(*lists.live.shape, E)
    rows = lists.rows_of(slots)
    keys, values = (x.flatten(0, 1)[rows] for x in (pool.keys, pool.values))  # [B, K, E, D]
    scores = torch.einsum("bkgd,bked->bkge", q.unflatten(1, (K, H // K)), keys)
    alive = (slots < lists.live[..., None])[:, :, None]
    weights = scores.masked_fill(~alive, -1e9).softmax(-1)
    return torch.einsum("bkge,bked->bkgd", weights * alive, values).flatten(1)


class ToyBackend:
    """Runs the model on state, as a backend does."""

    def __init__(self, manifest: Manifest, batch: int, pages: int) -> None:
        self.manifest = manifest
        self.graphs = ToyGraphs(manifest)
        self.state = State(manifest, batch, pages)
        self.calls: list[tuple[str, int | None]] = []

    def run(self, phase: str, feeds: dict[str, Tensor], row: int | None = None) -> Tensor:
        self.calls.append((phase, row))
        rows = slice(None) if row is None else slice(row, row + 1)
        described = self.manifest.phases[phase]
        tensors = {
            x.name: self.state.tensor(x.name, rows) if self.state.has(x.name) else feeds[x.name]
            for x in described.inputs
        }
        given = self.graphs(phase, tensors)
        for port in described.outputs:
            if port.state is not None and port.aliases is None:
                self.state.tensor(port.state, rows).copy_(given[port.name])
        return given["logits"]


def with_model(manifest: Manifest, **changes: Any) -> Manifest:
    """A manifest of a model that differs in some fields."""
    return dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, **changes))
