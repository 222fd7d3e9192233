# SPDX-License-Identifier: Apache-2.0
"""Number formats of stored rows: bit for bit what ModelOpt's quantizers compute, in as many bytes as promised."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from torch import Tensor

from modelopt_dms.kernels.number_formats import Fp8, Int8, Nvfp4, RowFormat
from modelopt_dms.kvcache.kv_format import KVFormatError, row_format

B, K, T = 2, 3, 5
DTYPES = (torch.float32, torch.bfloat16)
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


@st.composite
def rows(draw: Any, dims: Any = (8, 16, 40, 64)) -> Tensor:
    """Rows [B, K, T, D] of mixed magnitudes, with zero rows and values on the grid."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dim = draw(st.sampled_from(dims))
    x = torch.randn(B, K, T, dim, generator=generator)
    x = x * 10.0 ** draw(st.integers(-6, 4))
    x = x * torch.randn(B, K, T, 1, generator=generator).exp()
    if draw(st.booleans()):
        x[:, 0] = 0
    if draw(st.booleans()):
        x[..., 0] = x.abs().max() * draw(st.sampled_from([1.0, -1.0, 0.5]))
    if draw(st.booleans()):
        x = x.round(decimals=1)
    return x.to(draw(st.sampled_from(DTYPES)))


def quantizer(**attributes: Any) -> TensorQuantizer:
    return TensorQuantizer(QuantizerAttributeConfig(**attributes))


def calibrated(x: Tensor, **attributes: Any) -> TensorQuantizer:
    """A quantizer calibrated on some other numbers, so that x also has values beyond its range."""
    found = quantizer(**attributes)
    axis = attributes.get("axis")
    dims = [i for i in range(4) if axis is None or i != axis]
    found.amax = (0.7 * x.float().abs().amax(dim=dims, keepdim=axis is not None)).clamp(min=1e-3)
    return found


STATIC: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": (4, 3)},
    "fp8 per head": {"num_bits": (4, 3), "axis": 1},
    "fp8 cast": {"num_bits": (4, 3), "use_constant_amax": True},
    "int8": {"num_bits": 8},
    "int8 per head": {"num_bits": 8, "axis": 1},
}
DYNAMIC: dict[str, dict[str, Any]] = {
    "fp8 per row": {"num_bits": (4, 3), "axis": (0, 1, 2), "type": "dynamic"},
    "int8 per row": {"num_bits": 8, "axis": (0, 1, 2), "type": "dynamic"},
}


def assert_stores_what_the_quantizer_computes(form: RowFormat, x: Tensor, expected: Tensor) -> None:
    stored = form.encode(x)
    D = x.shape[-1]
    assert stored.dtype == torch.uint8
    assert stored.shape == (B, K, T, form.row_bytes(D))
    assert torch.equal(form.decode(stored, D, x.dtype), expected)
    for head in range(K):  # one list, as the cache reads it
        one = form.decode(stored[0, head], D, x.dtype, head)
        assert torch.equal(one, expected[0, head])


@pytest.mark.parametrize("name", STATIC)
@given(x=rows())
@settings(max_examples=40)
def test_calibrated_formats_equal_modelopts_quantizer(name: str, x: Tensor) -> None:
    attributes = dict(STATIC[name])
    found = quantizer(**attributes) if "cast" in name else calibrated(x, **attributes)
    assert_stores_what_the_quantizer_computes(row_format(found), x, found(x))


@pytest.mark.parametrize("name", DYNAMIC)
@given(x=rows())
@settings(max_examples=40)
def test_formats_with_a_scale_a_row_equal_modelopts_quantizer(name: str, x: Tensor) -> None:
    found = quantizer(**DYNAMIC[name])
    assert_stores_what_the_quantizer_computes(row_format(found), x, found(x))


@given(x=rows(dims=(16, 64)))
@settings(max_examples=60)
def test_nvfp4_equals_modelopts_packed_tensor_to_the_last_bit(x: Tensor) -> None:
    amax = (0.7 * x.float().abs().max()).clamp(min=1e-3)
    double_scale = amax / (6.0 * 448.0)
    packed, scale, _ = NVFP4QTensor.quantize(
        x.float(), 16, weights_scaling_factor_2=double_scale, try_tensorrt=False
    )
    form = Nvfp4(amax.view(1))
    stored = form.encode(x)
    D = x.shape[-1]
    assert torch.equal(stored[..., : D // 2], packed._quantized_data.view(B, K, T, D // 2))
    assert torch.equal(stored[..., D // 2 :], scale.view(torch.uint8).view(B, K, T, D // 16))
    expected = packed.dequantize(
        dtype=torch.float32, scale=scale, double_scale=double_scale, block_sizes={-1: 16}
    )
    assert torch.equal(form.decode(stored, D, torch.float32), expected.view_as(x))


@given(x=rows(dims=(7, 16, 40)), kind=st.sampled_from([Fp8, Int8, Nvfp4]))
def test_storing_what_was_read_changes_nothing(x: Tensor, kind: type[RowFormat]) -> None:
    form = kind(x.float().abs().max().clamp(min=1e-3).view(1))
    D = x.shape[-1]
    once = form.decode(form.encode(x), D, torch.float32)
    assert torch.equal(form.decode(form.encode(once), D, torch.float32), once)


@pytest.mark.parametrize(
    ("form", "bytes_per_row"),
    [
        (Fp8(torch.ones(1)), 128),
        (Fp8(None), 132),
        (Int8(torch.ones(3)), 128),
        (Nvfp4(torch.ones(1)), 64 + 8),
    ],
)
def test_bytes_of_a_row_of_128_values(form: RowFormat, bytes_per_row: int) -> None:
    assert form.row_bytes(128) == bytes_per_row
    assert form.encode(torch.randn(1, 3, 4, 128)).shape[-1] == bytes_per_row


def test_a_quantizer_that_does_nothing_leaves_the_models_dtype() -> None:
    assert row_format(None) is None
    assert row_format(quantizer(num_bits=8, enable=False)) is None


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_bits": 4}, "num_bits 4"),
        ({"num_bits": (4, 3), "block_sizes": {-1: 32}}, "block_sizes"),
        ({"num_bits": 8, "axis": (0, 1), "type": "dynamic"}, "axis"),
        ({"num_bits": (4, 3), "rotate": True}, "rotation"),
        ({**NVFP4, "block_sizes": {**NVFP4["block_sizes"], -1: 32}}, "blocks of 32"),
    ],
)
def test_what_the_cache_cannot_store_is_refused_with_what_it_can(
    attributes: dict[str, Any], message: str
) -> None:
    found = quantizer(**attributes)
    found.amax = torch.ones(())
    with pytest.raises(KVFormatError, match=message) as caught:
        row_format(found)
    assert "fp8 (e4m3), int8, or dynamic nvfp4" in str(caught.value)


def test_quantizers_without_ranges_are_refused() -> None:
    with pytest.raises(KVFormatError, match="calibrate"):
        row_format(quantizer(num_bits=(4, 3)))
