"""Fused norms against the torch code that they replace, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine.llm.layers.norms import NORMS, NormName
from rollmill.moe import Choices

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.llm.gpu import norms  # noqa: E402 (after the conftest's set-up)
from rollmill.quant.gpu.quantize import quantize_fp8  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
SHAPES = [(1, 16), (5, 64), (3, 96), (2, 2048), (2, 2880)]
KINDS = list(NORMS)
shapes = pytest.mark.parametrize(("rows", "cols"), SHAPES)
kinds = pytest.mark.parametrize("kind", KINDS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(torch.atleast_1d(x).contiguous().view(torch.uint8) for x in (a, b)))


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many BF16 numbers lie between a and b, which have one sign."""
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()


def assert_as_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for few elements next to a boundary: rms(x) is some units of float32 off.

    "rms" rounds twice, so one step before the product is up to two after it.
    """
    apart = steps_apart(found, expected)
    assert int(apart.max()) <= 2
    assert float((apart > 0).float().mean()) <= 1e-3


@shapes
@kinds
def test_norm_equals_torch(rows: int, cols: int, kind: NormName):
    x, weight = random(rows, cols) * 3, random(cols, seed=1)
    assert_as_rounded(norms.rms_norm(x, weight, EPS, kind), NORMS[kind](x, weight, EPS))


@kinds
def test_norm_has_torchs_bits_where_the_sum_is_exact(kind: NormName):
    """Small integers: their squares' sum is exact in any order."""
    x = torch.randint(-15, 16, (33, 256), generator=torch.Generator().manual_seed(3)).bfloat16().to(DEVICE)
    weight = random(256)
    assert same_bits(norms.rms_norm(x, weight, EPS, kind), NORMS[kind](x, weight, EPS))


@kinds
def test_norm_equals_float64(kind: NormName):
    x, weight = random(7, 320) * 0.01, random(320, seed=1)
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    expected = wide * (weight.double() + (kind == "rms_offset"))
    found = norms.rms_norm(x, weight, EPS, kind).double()
    assert bool(((found - expected).abs() <= expected.abs() * 2**-7).all())  # two roundings to 8 bits


@shapes
@kinds
def test_sum_and_norm_equal_torch(rows: int, cols: int, kind: NormName):
    x, y, weight = random(rows, cols), random(rows, cols, seed=7), random(cols, seed=1)
    total, out = norms.add_rms_norm(x, y, weight, EPS, kind)
    assert same_bits(total, x + y)
    assert same_bits(out, norms.rms_norm(total, weight, EPS, kind))
    assert_as_rounded(out, NORMS[kind](x + y, weight, EPS))


@pytest.mark.parametrize("placed", [False, True], ids=["in order", "placed"])
@shapes
def test_choices_are_summed_on_the_way(rows: int, cols: int, placed: bool):
    x, weight = random(rows, cols), random(cols, seed=1)
    choices = Choices(random(3 * rows, cols), torch.rand(rows, 3, device=DEVICE))
    y = choices.values.double().view(rows, 3, cols)
    if placed:
        places = torch.randperm(3 * rows, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        choices = Choices(choices.values, choices.weights, places.int().view(rows, 3))
        y = choices.values.double()[places].view(rows, 3, cols)
    y = (y * choices.weights.double()[..., None]).sum(1)  # float32 may round to the next BF16
    assert float((choices.sum().double() - y).abs().max()) <= float(y.abs().max()) * 2**-8
    total, out = norms.add_rms_norm(x, choices, weight, EPS, "rms")
    assert same_bits(total, x + choices.sum())
    assert_as_rounded(out, NORMS["rms"](total, weight, EPS))
    found = norms.add_rms_norm_quantize_fp8(x, choices, weight, EPS, "rms", keep=True)
    for part, expected in zip(found, (total, out, *quantize_fp8(out)), strict=True):
        assert part is not None
        assert same_bits(part, expected)


def test_heads_are_rows_too():
    x, weight = random(3, 4, 64), random(64)
    assert_as_rounded(norms.rms_norm(x, weight, EPS, "rms"), NORMS["rms"](x, weight, EPS))


def test_a_strided_input_is_read_right():
    x, weight = random(3, 128), random(64)
    assert same_bits(
        norms.rms_norm(x[:, :64], weight, EPS, "rms"), norms.rms_norm(x[:, :64].clone(), weight, EPS, "rms")
    )


def test_rows_of_zeros():
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE), random(64)
    total, out, codes, scale = norms.add_rms_norm_quantize_fp8(x, x, weight, EPS, "rms", keep=True)
    assert not total.any()
    assert not out.any()
    assert not codes.float().any()
    assert scale.tolist() == [1, 1]


@pytest.mark.parametrize("static", [None, 0.0123], ids=["per token", "static"])
@pytest.mark.parametrize("add", [False, True], ids=["norm", "sum and norm"])
@shapes
def test_codes_are_those_of_the_bf16_norm(rows: int, cols: int, add: bool, static: float | None):
    x, y, weight = random(rows, cols), random(rows, cols, seed=7), random(cols, seed=1)
    given = None if static is None else torch.tensor(static, device=DEVICE)
    if add:
        total, out, codes, scale = norms.add_rms_norm_quantize_fp8(x, y, weight, EPS, "rms", given, keep=True)
        assert same_bits(total, x + y)
        x = total
    else:
        out, codes, scale = norms.rms_norm_quantize_fp8(x, weight, EPS, "rms", given, keep=True)
    assert out is not None
    assert same_bits(out, norms.rms_norm(x, weight, EPS, "rms"))
    expected_codes, expected_scale = quantize_fp8(out, given)
    assert same_bits(codes, expected_codes)
    assert same_bits(scale, expected_scale)


def test_codes_alone_are_the_same():
    x, y, weight = random(5, 96), random(5, 96, seed=7), random(96, seed=1)
    kept = norms.add_rms_norm_quantize_fp8(x, y, weight, EPS, "rms", keep=True)
    total, out, codes, scale = norms.add_rms_norm_quantize_fp8(x, y, weight, EPS, "rms")
    assert out is None
    assert same_bits(codes, kept[2])
    assert same_bits(scale, kept[3])
    assert same_bits(total, kept[0])
    assert norms.rms_norm_quantize_fp8(x, weight, EPS, "rms")[0] is None


def test_a_row_does_not_depend_on_the_others():
    x, y, weight = random(9, 96), random(9, 96, seed=7), random(96, seed=1)
    whole = norms.add_rms_norm_quantize_fp8(x, y, weight, EPS, "rms", keep=True)
    alone = norms.add_rms_norm_quantize_fp8(x[4:5], y[4:5], weight, EPS, "rms", keep=True)
    for many, one in zip(whole, alone, strict=True):
        assert many is not None
        assert one is not None
        assert same_bits(many[4:5], one)


def test_no_rows():
    empty, weight = random(0, 64), random(64)
    assert norms.rms_norm(empty, weight, EPS, "rms").shape == (0, 64)
    _, _, codes, scale = norms.add_rms_norm_quantize_fp8(empty, empty, weight, EPS, "rms")
    assert (codes.shape, scale.shape) == ((0, 64), (0,))
