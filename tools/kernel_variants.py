# SPDX-License-Identifier: Apache-2.0
"""The kernel variants that docs/kernels.md lists: what is launched for common models on Hopper."""

from typing import Any

import torch
import triton.language as tl

from modelopt_dms.kernels import append, decode, prefill, prefill_backward, prefill_chunk
from modelopt_dms.kernels.layout import LayerShape, RowLayout
from modelopt_dms.kernels.prefill_blocks import Tile, head_constants, scoring_constants
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.variants import Variant


def all_variants() -> list[Variant]:
    """Every variant, in the order of the table."""
    found = [
        *append_variants(),
        *decode_variants(),
        *prefill_variants(),
        *backward_variants(),
        *chunk_variants(),
    ]
    names = [variant.name for variant in found]
    assert len(set(names)) == len(names), f"two variants share a name: {sorted(names)}"
    return found


def append_variants() -> list[Variant]:
    """8 KV heads, a window of 256, decisions that govern their own token."""

    def both(keys: RowLayout, values: RowLayout | None = None, heads: int = 8) -> LayerShape:
        return LayerShape(keys, values or keys, heads, 1)

    bf16 = torch.bfloat16
    formats = {
        "bf16": both(RowLayout("plain", 128, bf16)),
        "fp8": both(RowLayout("fp8", 128, torch.uint8)),
        "fp8_rows": both(RowLayout("fp8", 128, torch.uint8, True)),
        "int8": both(RowLayout("int8", 128, torch.uint8)),
        "nvfp4": both(RowLayout("nvfp4", 128, torch.uint8)),
    }
    narrow = both(RowLayout("plain", 64, bf16))
    latent = both(RowLayout("plain", 512, bf16), RowLayout("plain", 64, bf16), 1)
    found = [append.append_variant(f"append_{name}", x, 4096) for name, x in formats.items()]
    found += [
        append.append_variant("append_bf16_decided", formats["bf16"], 0),
        append.append_variant("append_bf16_logged", formats["bf16"], 4096, logged=256),
        append.append_variant("append_bf16_d64", narrow, 2048),
        append.append_variant("append_bf16_latent", latent, 2048),
    ]
    found += [append.pack_variant(f"pack_{name}", x) for name, x in formats.items()]
    found += [
        append.pack_variant("pack_bf16_d64", narrow),
        append.pack_variant("pack_bf16_latent", latent),
        _move_variant("move_nvfp4", formats["nvfp4"]),
    ]
    return found


def _move_variant(name: str, shape: LayerShape) -> Variant:
    layouts = (shape.keys, shape.values)
    types = {f"{x}_ptr": "*i32" for x in ("sources", "targets", "count", "table")}
    types |= {"pages": "i32"} | append.stored_types(layouts)
    return append.variant(
        name, append._move_kernel, types, append.move_constants(layouts, shape.window + 1), 4
    )


def decode_variants() -> list[Variant]:
    """Formats, head dims and groups of decode kernels."""

    def plain(dim: int) -> RowLayout:
        return RowLayout("plain", dim, torch.bfloat16)

    half = RowLayout("plain", 128, torch.float16)
    fp8, nvfp4 = (RowLayout(number, 128, torch.uint8) for number in ("fp8", "nvfp4"))
    int8 = RowLayout("int8", 128, torch.uint8, per_row=True)
    simple = Scoring(128**-0.5)
    capped = Scoring(256**-0.5, 50.0)
    sinks = Scoring(64**-0.5, None, torch.zeros(64))
    bf16 = LayerShape(plain(128), plain(128), 8, 4)
    halves = LayerShape(half, half, 8, 4, torch.float16)
    return [
        decode.decode_variant("decode_bf16_d128_g4", bf16, simple),
        decode.decode_variant("decode_fp16_d128_g4", halves, simple),
        decode.decode_variant("decode_fp8_d128_g4", LayerShape(fp8, fp8, 8, 4), simple),
        decode.decode_variant("decode_nvfp4_d128_g4", LayerShape(nvfp4, nvfp4, 8, 4), simple),
        decode.decode_variant("decode_fp8_nvfp4_d128_g16", LayerShape(fp8, nvfp4, 2, 16), simple),
        decode.decode_variant("decode_int8_rows_d128_g4", LayerShape(int8, int8, 8, 4), simple),
        decode.decode_variant("decode_bf16_fp8_d128_g4", LayerShape(plain(128), fp8, 8, 4), simple),
        decode.decode_variant(
            "decode_bf16_d64_g8_sinks", LayerShape(plain(64), plain(64), 8, 8), sinks
        ),
        decode.decode_variant(
            "decode_bf16_d96_g1", LayerShape(plain(96), plain(96), 32, 1), simple
        ),
        decode.decode_variant(
            "decode_bf16_d256_g2_capped", LayerShape(plain(256), plain(256), 8, 2), capped
        ),
        decode.decode_variant(
            "decode_latent_h16", LayerShape(plain(512), plain(64), 1, 16), simple, latent=True
        ),
        decode.decode_variant(
            "decode_latent_h128", LayerShape(plain(512), plain(64), 1, 128), simple, latent=True
        ),
        decode.combine_variant("decode_combine_d128_g4", bf16),
    ]


def prefill_variants() -> list[Variant]:
    """Head dims of training attention, and one with documents, softcap and sinks."""
    shapes = [(64, 64, 4), (96, 96, 4), (128, 128, 4), (256, 256, 2), (192, 128, 1)]
    return [_prefill_variant(D, DV, G, False) for D, DV, G in shapes] + [
        _prefill_variant(128, 128, 4, True)
    ]


def _prefill_variant(D: int, DV: int, G: int, full: bool) -> Variant:
    """The forward kernel for these shapes; `full` has documents, softcap and sinks."""
    tile = prefill.forward_tile(D, DV, torch.bfloat16)
    pointers = {name: "*bf16" for name in ("q", "k", "v", "out")}
    pointers |= {name: "*fp32" for name in ("bias", "sinks", "lse")}
    constants = {
        **scoring_constants(Scoring(D**-0.5, 50.0 if full else None)),
        **head_constants(D, DV),
        "H": 8 * G,
        "G": G,
        "M": tile.queries,
        "N": tile.keys,
        "HAS_STARTS": full,
        "HAS_SINKS": full,
        "DOT": tl.bfloat16,
    }
    return Variant(
        f"prefill_d{D}_{DV}" + ("_full" if full else ""),
        prefill._forward_kernel,
        {**pointers, "starts": "*i32", "T": "i32", "window": "i32"},
        constants,
        tile.warps,
        tile.stages,
    )


def backward_variants() -> list[Variant]:
    """Head dims of its gradients."""
    found = []
    for D, DV, G in [(64, 64, 4), (128, 128, 4), (256, 256, 2), (192, 128, 1)]:
        found.append(
            _backward_variant(
                D,
                DV,
                G,
                prefill_backward._query_kernel,
                prefill_backward.query_tile(D, DV, torch.bfloat16),
                "dq",
                {"H": 8 * G},
            )
        )
        for with_k, with_v in prefill_backward.key_passes(D, DV):
            name = "d" + "k" * with_k + "v" * with_v
            flags = {"K": 8, "WITH_K": with_k, "WITH_V": with_v}
            tile = prefill_backward.key_tile(D, DV, torch.bfloat16)
            found.append(
                _backward_variant(D, DV, G, prefill_backward._key_kernel, tile, name, flags)
            )
    return found


def _backward_variant(
    D: int, DV: int, G: int, kernel: Any, tile: Tile, name: str, more: dict[str, Any]
) -> Variant:
    pointers = {x: "*bf16" for x in ("q", "k", "v", "gradient", "dq", "dk", "dv")}
    pointers |= {x: "*fp32" for x in ("bias", "lse", "delta", "dbias")}
    types = pointers | {"starts": "*i32", "ends": "*i32", "T": "i32", "window": "i32"}
    constants = {
        **scoring_constants(Scoring(D**-0.5)),
        **head_constants(D, DV),
        "G": G,
        "M": tile.queries,
        "N": tile.keys,
        "HAS_STARTS": False,
        "DOT": tl.bfloat16,
        **more,
    }
    names = {x: kind for x, kind in types.items() if x in kernel.arg_names}
    return Variant(f"prefill_{name}_d{D}_{DV}", kernel, names, constants, tile.warps, tile.stages)


def chunk_variants() -> list[Variant]:
    """Formats of pages that chunks of prompts read."""

    def shape(layout: RowLayout) -> LayerShape:
        return LayerShape(layout, layout, 8, 4)

    plain = RowLayout("plain", 128, torch.bfloat16)
    fp8 = RowLayout("fp8", 128, torch.uint8)
    nvfp4 = RowLayout("nvfp4", 128, torch.uint8)
    fp8_rows = RowLayout("fp8", 128, torch.uint8, per_row=True)
    simple, capped = Scoring(128**-0.5), Scoring(128**-0.5, 50.0, torch.zeros(32))
    return [
        prefill_chunk.chunk_variant("prefill_chunk_bf16_d128", shape(plain), simple),
        prefill_chunk.chunk_variant("prefill_chunk_fp8_d128", shape(fp8), simple),
        prefill_chunk.chunk_variant("prefill_chunk_nvfp4_d128", shape(nvfp4), simple),
        prefill_chunk.chunk_variant(
            "prefill_chunk_fp8_rows_full_d128", shape(fp8_rows), capped, documents=True
        ),
    ]
