# SPDX-License-Identifier: Apache-2.0
"""The five ops of an engine against their references, however their kernels are run: interpreted, or as PTX."""

from collections.abc import Callable

import torch
from torch import Tensor

from modelopt_dms.exporters.tensorrt.expressions import dims_of
from modelopt_dms.kernels import append_reference, decode_reference, prefill_reference
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.kernels.layout import PAGE, LayerShape, PagePool, PageTables
from modelopt_dms.kernels.number_formats import Fp8, Int8, RowFormat
from modelopt_dms.kernels.prefill_blocks import own_starts
from modelopt_dms.kernels.prefill_reference import Chunk, log2_bias
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.rows import write_rows
from modelopt_dms.runtime.operators import OPERATORS

# Runs one op: its name, its inputs and its outputs, which it fills.
Run = Callable[[str, dict[str, Tensor], dict[str, Tensor]], None]
PAGES = 3  # a list can own


class Layer:
    """Lists of given lengths [B][K] with random rows, the ring of the newest tokens, and pages for what comes."""

    def __init__(
        self, shape: LayerShape, live: list[list[int]], device: torch.device, seed: int = 0
    ) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.tensor(live, dtype=torch.int32)
        B, K = lengths.shape
        self.random = lambda *size: torch.randn(*size, generator=generator).to(device, shape.dtype)
        self.coin = lambda chance, *size: (torch.rand(*size, generator=generator) < chance).to(
            device
        )
        formats = tuple(_format(x.number, K, device) for x in (shape.keys, shape.values))
        active = torch.ones(B, dtype=torch.bool, device=device)
        self.lists = PageTables.make(
            B, K, PAGES, shape.window, shape.shift, active, (formats[0], formats[1])
        )
        self.pool = PagePool.make(B * K * PAGES, shape.keys, shape.values, device)
        ids = torch.randperm(B * K * PAGES, generator=generator) + 1
        self.lists.table.copy_(ids.view(B, K, PAGES))
        self.lists.live.copy_(lengths)
        self.lists.seen.fill_(int(lengths.max()))
        most = max(1, int(lengths.max()))
        slots = torch.arange(most).expand(B, K, most)
        slots = torch.where(slots < lengths[..., None], slots, -1).to(device)
        k = self.random(B, K, most, shape.keys.dim)
        v = self.random(B, K, most, shape.values.dim)
        write_rows(self.pool, self.lists, slots, k, v)

    def tensors(self) -> dict[str, Tensor]:
        """As an engine's ports: codes of a byte are int8."""
        lists, pool = self.lists, self.pool
        codes = [
            x.view(torch.int8) if x.dtype == torch.uint8 else x for x in (pool.keys, pool.values)
        ]
        return {
            "scales": lists.scales,
            "table": lists.table,
            "keys": codes[0],
            "values": codes[1],
            "live": lists.live,
            "seen": lists.seen,
            "ring_slot": lists.ring_slot,
            "ring_evict": lists.ring_evict,
        }

    def run(
        self, run: Run, name: str, inputs: dict[str, Tensor], **sizes: int
    ) -> dict[str, Tensor]:
        """Outputs of an op that are tensors of their own, filled with garbage before."""
        operator = OPERATORS[name]
        every = {**self.tensors(), **inputs}
        given = {x.name: every[x.name] for x in operator.inputs}
        dims = {**sizes, **dims_of(operator.inputs, [x.shape for x in given.values()])}
        kinds = {"model": self.shape.dtype, "float32": torch.float32, "int32": torch.int32}
        outputs = {
            x.name: torch.full(
                [int(d) if d.isdigit() else dims[d] for d in x.shape],
                1 << 20 if x.kind == "int32" else float("nan"),
                dtype=kinds[x.kind],
                device=given["live"].device if "live" in given else given["table"].device,
            )
            for x in operator.outputs
            if x.aliases is None
        }
        run(name, given, outputs)
        return outputs


def _format(number: str, heads: int, device: torch.device) -> RowFormat | None:
    amax = torch.linspace(4.0, 6.0, heads, device=device)
    return {"plain": None, "fp8": Fp8(amax), "int8": Int8(amax)}[number]


def check_update(run: Run, shape: LayerShape, device: torch.device, steps: int = 20) -> None:
    """DmsCacheUpdate, step by step, leaves what `append_token` leaves: to the bit."""
    ours, theirs = (Layer(shape, [[60, 40], [0, 0], [59, 3]], device) for _ in range(2))
    for step in range(steps):
        B, K = ours.lists.live.shape
        k = ours.random(B, K, shape.keys.dim)
        v = ours.random(B, K, shape.values.dim)
        evict = ours.coin(0.3, B, K)
        active = torch.tensor([True, step % 2 == 0, True], device=device)
        theirs.lists.active.copy_(active)
        append_reference.append_token(k, v, Decided(evict), theirs.pool, theirs.lists)
        ours.run(run, "DmsCacheUpdate", {"k": k, "v": v, "evict": evict, "active": active})
    for name in ("table", "live", "seen", "ring_slot", "ring_evict"):
        assert torch.equal(getattr(ours.lists, name), getattr(theirs.lists, name)), name
    assert int(ours.lists.live.max()) > PAGE
    # Page 0 belongs to nobody.
    assert torch.equal(ours.pool.keys[1:], theirs.pool.keys[1:])
    assert torch.equal(ours.pool.values[1:], theirs.pool.values[1:])


def check_decode(
    run: Run, shape: LayerShape, device: torch.device, programs: int, tolerance: float
) -> None:
    """DmsDecodePartial and DmsDecodeCombine are attention over ragged lists, empty ones among them."""
    layer = Layer(shape, [[130, 0], [1, 64], [0, 0], [65, 190]], device)
    q = layer.random(4, 2 * shape.group, shape.keys.dim)
    sizes = {"programs": programs, "rows": shape.group, "value_dim": shape.values.dim}
    found = layer.run(run, "DmsDecodePartial", {"q": q}, **sizes)
    out = layer.run(run, "DmsDecodeCombine", found)["out"]
    scoring = Scoring(shape.keys.dim**-0.5)
    expected = decode_reference.decode_attention(q, layer.pool, layer.lists, scoring)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    assert (out[2] == 0).all()


def check_attention(
    run: Run, shape: LayerShape, device: torch.device, tokens: int, tolerance: float
) -> None:
    """DmsPrefillAttention is `attend_chunk`: rows that expire, and a first chunk that is padded on the left."""
    layer = Layer(shape, [[130, 7], [0, 0], [64, 1]], device)
    B, K, T = 3, 2, tokens
    q = layer.random(B, K * shape.group, T, shape.keys.dim)
    k, v = layer.random(B, K, T, shape.keys.dim), layer.random(B, K, T, shape.values.dim)
    evict = layer.coin(0.5, B, K, T)
    padding = torch.tensor([0, T // 3, 0], device=device)
    starts = torch.where(padding > 0, padding, -1)[:, None].expand(B, T).to(torch.int32)
    first = torch.tensor([200, 0, 90], dtype=torch.int32, device=device)
    expiry = torch.full((B, K, PAGES * PAGE), 1 << 30, dtype=torch.int32, device=device)
    soon = layer.coin(0.3, B, K, PAGES * PAGE)
    expiry = torch.where(soon, first[:, None, None] + T // 2, expiry)
    given = {
        "q": q,
        "k": k,
        "v": v,
        "bias": log2_bias(torch.where(evict, float("-inf"), 0.0)),
        "starts": own_starts(starts),
        "first": first,
        "expiry": expiry,
    }
    out = layer.run(run, "DmsPrefillAttention", given)["out"]
    expected = prefill_reference.attend_chunk(
        Chunk(q, k, v, evict, first, starts, expiry),
        layer.pool,
        layer.lists,
        Scoring(shape.keys.dim**-0.5),
    )
    # Padding reads whatever it likes.
    real = torch.arange(T, device=device) >= padding[:, None]  # [B, T]
    for found, wanted in zip(out, expected, strict=True):
        assert found.shape == wanted.shape
    pick = real[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[pick], expected[pick], atol=tolerance, rtol=tolerance)


def check_write(run: Run, shape: LayerShape, device: torch.device, tokens: int) -> None:
    """DmsPrefillWrite stores what `apply_plan` stores: to the bit."""
    ours, theirs = (Layer(shape, [[30, 7], [0, 0]], device) for _ in range(2))
    B, K, T = 2, 2, tokens
    k, v = ours.random(B, K, T, shape.keys.dim), ours.random(B, K, T, shape.values.dim)
    evict = ours.coin(0.5, B, K, T)
    plan = append_reference.plan_pack(evict, None, ours.lists)
    assert -1 in plan.slots.unique() and int(plan.slots.max()) > PAGE
    ours.run(run, "DmsPrefillWrite", {"k": k, "v": v, "slots": plan.slots.contiguous()})
    append_reference.apply_plan(plan, k, v, theirs.pool, theirs.lists)
    assert torch.equal(ours.pool.keys[1:], theirs.pool.keys[1:])
    assert torch.equal(ours.pool.values[1:], theirs.pool.values[1:])
