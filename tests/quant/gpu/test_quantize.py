"""Activation quantizers: bit-equal to the reference, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import NVFP4, numerics
from rollmill.quant.kernels.activation import quantize_activation
from rollmill.quant.layout import swizzle_scales

triton = pytest.importorskip("triton", reason="triton is not installed")

from rollmill.quant.gpu.quantize import nvfp4_products, quantize_fp8, quantize_nvfp4  # noqa: E402 (after the conftest's set-up)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 16), (5, 64), (7, 96), (3, 2048)]


def activations(rows: int, cols: int) -> torch.Tensor:
    """Rows of very different size; a row of zeros, a block of zeros, a row near float32's smallest numbers."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    spread = torch.exp(3 * torch.randn(rows, 1, generator=generator))
    x = (torch.randn(rows, cols, generator=generator) * spread).bfloat16()
    x[0, :16] = 0
    if rows > 4:
        x[2], x[3] = 0, 1e-30
    return x.to(DEVICE)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("static", [None, 0.0123], ids=["per token", "static"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_nvfp4_equals_the_reference(rows: int, cols: int, static: float | None):
    x = activations(rows, cols)
    scale = None if static is None else torch.tensor(static, device=DEVICE)
    amax = x.abs().amax(-1, keepdim=True).float()
    encode = numerics.nvfp4_encode(amax) if scale is None else scale.reciprocal()
    values, block_scales = numerics.quantize_nvfp4_activation(x, encode)
    codes, scales, token = quantize_nvfp4(x, scale)
    assert torch.equal(numerics.decode_e2m1(codes), values.flatten(-2))
    assert same_bits(scales, block_scales.to(torch.float8_e4m3fn))
    if scale is None:
        assert same_bits(token, encode.reciprocal()[:, 0])


@pytest.mark.parametrize("static", [None, 0.0123], ids=["per token", "static"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_products_are_those_of_the_reference(rows: int, cols: int, static: float | None):
    x = activations(rows, cols)
    scale = None if static is None else torch.tensor(static, device=DEVICE)
    expected, decode = quantize_activation(x, NVFP4(activation="static" if static else "per_token"), scale, x.dtype)
    products, token = nvfp4_products(x, scale)
    assert same_bits(products, expected)
    assert torch.equal(token.flatten(), decode.flatten()) or static is not None


@pytest.mark.parametrize(("layout", "tile"), [("128x4", 128), ("8x4", 8)])
@pytest.mark.parametrize(("rows", "cols"), SHAPES[:3])
def test_scales_lie_as_the_layout_says_and_pad_with_zeros(rows: int, cols: int, layout: str, tile: int):
    x = activations(rows, cols)
    linear = quantize_nvfp4(x)[1]
    assert same_bits(quantize_nvfp4(x, layout=layout)[1], swizzle_scales(linear, tile))


@pytest.mark.parametrize("static", [None, 0.0123], ids=["per token", "static"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_fp8_equals_the_reference(rows: int, cols: int, static: float | None):
    x = activations(rows, cols)
    scale = numerics.decode_scale(x.abs().amax(-1, keepdim=True).float(), numerics.E4M3_MAX)
    given = None if static is None else torch.tensor(static, device=DEVICE)
    codes, token = quantize_fp8(x, given)
    assert same_bits(codes, numerics.quantize_fp8_activation(x, scale if given is None else given))
    if given is None:
        assert same_bits(token, scale[:, 0])


@pytest.mark.parametrize("quantize", [nvfp4_products, quantize_fp8], ids=["nvfp4", "fp8"])
def test_rows_repeated_with_a_static_scale_each(quantize):
    x, scales = activations(5, 64), torch.linspace(0.001, 0.02, 15, device=DEVICE)
    values, given = quantize(x, scales, repeat=3)
    assert given is scales
    for row in range(15):
        assert same_bits(values[row : row + 1], quantize(x[row // 3 : row // 3 + 1], scales[row])[0])
    one = scales[3:4]  # a tensor of one element is for all
    assert same_bits(quantize(x, one)[0], quantize(x, one[0])[0])


def test_a_row_does_not_depend_on_the_others():
    x = activations(7, 96)
    whole, alone = quantize_nvfp4(x), quantize_nvfp4(x[4:5])
    assert all(same_bits(a[4:5], b) for a, b in zip(whole, alone, strict=True))
    whole, alone = nvfp4_products(x), nvfp4_products(x[4:5])
    assert all(same_bits(a[4:5], b) for a, b in zip(whole, alone, strict=True))
    whole, alone = quantize_fp8(x), quantize_fp8(x[4:5])
    assert all(same_bits(a[4:5], b) for a, b in zip(whole, alone, strict=True))


def test_a_nan_stays_one_in_fp8():
    x = activations(5, 64)
    x[1, 3] = float("nan")
    assert bool(quantize_fp8(x)[0].float()[1, 3].isnan())


def test_no_rows():
    empty = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    assert quantize_nvfp4(empty)[0].shape == (0, 32)
    assert quantize_fp8(empty)[0].shape == nvfp4_products(empty)[0].shape == (0, 64)


def test_every_e2m1_tie_rounds_to_the_even_code():
    """A block whose scale is 1: max 6, the row's decode scale 6 / 2688 times block scale 448."""
    magnitudes = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 0, 0.5, 1, 1.5, 2, 3, 4, 0.2]
    x = torch.tensor([magnitudes, [-m for m in magnitudes]], dtype=torch.bfloat16, device=DEVICE)
    codes = quantize_nvfp4(x)[0]
    decoded = numerics.decode_e2m1(codes).cpu()
    expected = torch.tensor([6, 0, 1, 1, 2, 2, 4, 4, 0, 0.5, 1, 1.5, 2, 3, 4, 0])
    assert torch.equal(decoded, torch.stack([expected, -expected]))
