"""Fused SwiGLU against torch, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from rollmill import moe

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.llm.gpu import silu  # noqa: E402 (after the conftest's set-up)
from rollmill.moe.activation import silu_and_mul  # noqa: E402
from rollmill.quant.gpu.quantize import quantize_fp8, quantize_nvfp4  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 16), (5, 64), (3, 96), (2, 2048), (2, 4112)]
shapes = pytest.mark.parametrize(("rows", "cols"), SHAPES)
statics = pytest.mark.parametrize("static", [None, 0.0123], ids=["per token", "static"])


def gate_up(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + cols)
    return (torch.randn(rows, 2 * cols, generator=generator) * 3).bfloat16().to(DEVICE)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(torch.atleast_1d(x).contiguous().view(torch.uint8) for x in (a, b)))


@pytest.mark.parametrize("up", [1.0, -1.7])
def test_every_gate_there_is(up: float):
    """All BF16 numbers: few silus are one step off where the exponentials differ by units of float32."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite()].view(-1, 32).to(DEVICE)
    both = torch.cat([gate, torch.full_like(gate, up)], dim=-1)
    found, expected = silu.silu_and_mul(both), silu_and_mul(both)
    apart = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert int(apart.max()) <= 2  # one step of silu is up to two of the product
    assert float((apart > 0).float().mean()) <= 2e-3


@shapes
def test_rows_equal_torch(rows: int, cols: int):
    x = gate_up(rows, cols)
    expected = moe.gated_activation("silu")(x)
    torch.testing.assert_close(silu.silu_and_mul(x), expected, rtol=2**-7, atol=0)


@statics
@shapes
def test_fp8_codes_are_those_of_the_bf16_product(rows: int, cols: int, static: float | None):
    x = gate_up(rows, cols)
    given = None if static is None else torch.tensor(static, device=DEVICE)
    found, expected = silu.silu_and_mul_quantize_fp8(x, given), quantize_fp8(silu.silu_and_mul(x), given)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@statics
@shapes
def test_nvfp4_codes_are_those_of_the_bf16_product(rows: int, cols: int, static: float | None):
    x = gate_up(rows, cols)
    given = None if static is None else torch.tensor(static, device=DEVICE)
    found, expected = silu.silu_and_mul_quantize_nvfp4(x, given), quantize_nvfp4(silu.silu_and_mul(x), given)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_too_long_for_one_program_have_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    x = gate_up(3, 96)
    short = silu.silu_and_mul_quantize_fp8(x), silu.silu_and_mul_quantize_nvfp4(x)
    monkeypatch.setattr(silu, "MOST_COLS", 64)
    long = silu.silu_and_mul_quantize_fp8(x), silu.silu_and_mul_quantize_nvfp4(x)
    for found, expected in zip(long, short, strict=True):
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_no_rows():
    empty = gate_up(0, 32)
    assert silu.silu_and_mul(empty).shape == (0, 32)
    assert silu.silu_and_mul_quantize_fp8(empty)[0].shape == (0, 32)
    assert silu.silu_and_mul_quantize_nvfp4(empty)[0].shape == (0, 16)
