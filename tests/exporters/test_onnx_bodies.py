# SPDX-License-Identifier: Apache-2.0
"""The bodies of our ops that read, run by onnxruntime, against `kernels.*_reference`; see also test_conformance.py."""

import pytest
import torch
from onnx_node import Formats, Layer, numbers, run
from paged_oracle import FORMATS
from torch import Tensor

from modelopt_dms.kernels import append_reference, decode_reference, prefill_reference
from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kernels.number_formats import Fp8
from modelopt_dms.kernels.prefill_reference import Chunk, expiry, log2_bias
from modelopt_dms.kernels.reference import Scoring, shift_decisions

B, K, G, D = 2, 2, 3, 16
STORED = ["plain", "fp8", "int8"]


def filled(
    formats: Formats, window: int = 5, shift: int = 0, tokens: int = 70, seed: int = 0
) -> Layer:
    """Lists of different lengths, in which some tokens are pending."""
    torch.manual_seed(seed)
    layer = Layer(B, K, 3, D, window, shift, formats)
    evict = torch.rand(B, K, tokens) < torch.tensor([[[0.1], [0.6]]])
    rows = torch.randn(2, B, K, tokens, D)
    append_reference.pack(*rows, evict, None, layer.pool, layer.lists)
    return layer


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("name", STORED)
def test_a_query_reads_its_lists(name: str, softcap: float) -> None:
    layer = filled(FORMATS[name])
    layer.lists.live[1, 0] = 0
    q = torch.randn(B, K * G, D)
    found = decoded(layer, q, softcap)
    scoring = Scoring(0.5, softcap or None)
    expected = decode_reference.decode_attention(q, layer.pool, layer.lists, scoring)
    torch.testing.assert_close(found, expected)
    assert not found[1, :G].any()


def decoded(layer: Layer, q: Tensor, softcap: float = 0.0) -> Tensor:
    facts = {"scale": 0.5, "softcap": softcap, "programs": 4, "rows": G, "value_dim": D}
    given = {"q": q, **layer.tensors()}
    parts = run("DmsDecodePartial", given, **facts, **numbers(layer.formats))
    return run("DmsDecodeCombine", {**parts, "live": layer.lists.live})["out"]


def test_partial_results_of_several_programs_are_joined() -> None:
    """Lists cut into runs of tokens, as the kernel cuts them, with what programs do not write left as garbage."""
    torch.manual_seed(3)
    layer = filled((None, None))
    q, scoring = torch.randn(B, K * G, D), Scoring(0.5)
    expected = decode_reference.decode_attention(q, layer.pool, layer.lists, scoring)
    programs = 7
    partial = torch.full((programs, 2, G, D), float("nan"))
    lse = torch.full((programs, 2, G), float("nan"))
    spans = torch.zeros(B, K, 2, dtype=torch.int32)
    whole = torch.full_like(q, float("nan"))
    first = 0
    for item, shares in enumerate((1, 2, 3, 2)):
        b, h = divmod(item, K)
        spans[b, h] = torch.tensor([first, first + shares - 1])
        if shares == 1:
            whole[b, h * G : (h + 1) * G] = expected[b, h * G : (h + 1) * G]
        else:
            keys, values = rows_of(layer, b, h)
            scores = q[b, h * G : (h + 1) * G] @ keys.T * scoring.scale  # [G, L]
            cuts = torch.arange(len(keys)).chunk(shares)
            for part, slots in enumerate(cuts):
                place = (first + part, int(part == 0))
                partial[place] = scores[:, slots].softmax(-1) @ values[slots]
                lse[place] = scores[:, slots].logsumexp(-1) / torch.tensor(2.0).log()
        # The next list begins in the program that this one ends in.
        first += shares - 1
    given = {"whole": whole, "partial": partial, "partial_lse": lse, "spans": spans}
    found = run("DmsDecodeCombine", {**given, "live": layer.lists.live})["out"]
    torch.testing.assert_close(found, expected)


def rows_of(layer: Layer, b: int, h: int) -> tuple[Tensor, Tensor]:
    slots = torch.arange(int(layer.lists.live[b, h]))
    page = layer.lists.table[b, h, slots // PAGE].long()
    return layer.pool.keys[page, slots % PAGE], layer.pool.values[page, slots % PAGE]


@pytest.mark.parametrize("window, shift, padded", [(5, 0, False), (5, 1, False), (3, 0, True)])
@pytest.mark.parametrize("name", STORED)
def test_a_chunk_reads_lists_and_itself(name: str, window: int, shift: int, padded: bool) -> None:
    T = 32
    layer = filled(FORMATS[name], window, shift, tokens=0 if padded else 70)
    q = torch.randn(B, K * G, T, D)
    k, v = torch.randn(2, B, K, T, D)
    evict = torch.rand(B, K, T) < 0.5
    starts = torch.full((B, T), -1, dtype=torch.int32)
    if padded:
        tokens = torch.arange(T)
        starts = torch.where(tokens < torch.tensor([[0], [9]]), tokens, torch.tensor([[-1], [9]]))
        starts = starts.int()
    governed = shift_decisions(evict, shift)
    first, until = layer.lists.seen[:, 0].contiguous(), expiry(layer.lists, 3 * PAGE)
    keep = torch.zeros(governed.shape).masked_fill(governed, float("-inf"))
    given = {"q": q, "k": k, "v": v, "bias": log2_bias(keep), "starts": starts, "first": first}
    facts = {"scale": 0.5, "softcap": 0.0, "window": window, **numbers(layer.formats)}
    given |= {"expiry": until, **layer.tensors()}
    found = run("DmsPrefillAttention", given, **facts)["out"]
    expected = prefill_reference.attend_chunk(
        Chunk(q, k, v, governed, first, starts, until), layer.pool, layer.lists, Scoring(0.5)
    )
    torch.testing.assert_close(found, expected)


def test_every_e4m3_number_and_every_tie_is_encoded_as_torch_does() -> None:
    form = Fp8(torch.tensor([448.0]))
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles * 1.001, values * 3])
    x = torch.nn.functional.pad(x, (0, -len(x) % D)).view(1, 1, -1, D)
    layer = Layer(1, 1, -(-x.shape[2] // PAGE), D, 0, 0, (form, form))
    slots = torch.arange(x.shape[2], dtype=torch.int32)[None, None]
    given = {"k": x, "v": x, "slots": slots, **layer.tensors()}
    found = run("DmsPrefillWrite", given, key_number="fp8", value_number="fp8")["new_keys"]
    got = found[layer.lists.table[0, 0].long()].flatten(0, 1)[: x.shape[2]]
    expected = form.encode(x)[0, 0]
    torch.testing.assert_close(got.view(torch.uint8) & 0x7F, expected & 0x7F, rtol=0, atol=0)
    assert torch.equal((got < 0)[x[0, 0] != 0], (expected >= 128)[x[0, 0] != 0])
