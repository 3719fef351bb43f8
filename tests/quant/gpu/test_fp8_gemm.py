"""FP8 linears on Hopper against float64: few tokens by the Triton kernel; on a GPU or in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rollmill.quant import FP8, NVFP4, Capability, FP8Rows, WeightShape, find_capability
from rollmill.quant.kernels.triton_fp8 import TritonFP8Kernel

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.quant.gpu import fp8_gemm, fp8_middle  # noqa: E402 (after the conftest's set-up)
from rollmill.quant.gpu.quantize import quantize_fp8  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = Capability(DEVICE, 90, ("triton",))
MODES = ["per_token", "per_tensor", "static"]
ULPS = 2  # of BF16: what a result may differ from float64
FLOAT32_SHARE = 1e-6  # of the sum of magnitudes: what float32 sums may lose
ROUNDING = 3e-3  # relative, of two roundings to BF16
INPUT_SCALE = 3 / 448  # static: some activations lie beyond


class Linear:
    """A weight as stored, packed, and bound to the kernel."""

    def __init__(self, scheme: FP8, rows: tuple[int, ...], cols: int, stored: dict[str, torch.Tensor]) -> None:
        self.scheme, self.rows, self.stored = scheme, rows, stored
        self.kernel = TritonFP8Kernel(scheme, WeightShape(rows, cols), torch.bfloat16, HOPPER)
        matrices = {name: stored[name] for name in scheme.matrices(self.kernel.shape)}
        scales = {name: stored[name] for name in scheme.scales(self.kernel.shape)}
        packed = self.kernel.prepare(matrices) | self.kernel.derive(scales)
        self.packed = {key: value.to(DEVICE) for key, value in packed.items()}

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.kernel.apply(x.to(DEVICE), self.packed, None if bias is None else bias.to(DEVICE)).cpu()


@pytest.fixture
def linear(random_stored):
    """`linear(activation, rows, cols)`: shards with unequal scales, or a scale a row."""

    def make(activation: str, rows: tuple[int, ...], cols: int, *, per_channel: bool = True) -> Linear:
        scheme = FP8(activation=activation, per_channel=per_channel)
        stored = dict(random_stored(scheme, rows, cols))
        if activation == "static":
            stored["input_scale"] = torch.full((len(rows),), INPUT_SCALE)
        if not per_channel:
            stored["weight_scale"] = stored["weight_scale"] * torch.tensor([1.0, 2.5, 0.3])[: len(rows)]
        return Linear(scheme, rows, cols, stored)

    return make


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN."""
    make: Callable[..., torch.Tensor] = torch.empty

    def poisoned(*args, **options) -> torch.Tensor:
        new = make(*args, **options)
        return new.fill_(torch.nan) if new.dtype == torch.bfloat16 else new

    monkeypatch.setattr(torch, "empty", poisoned)


def activations(count: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count + cols)
    spread = torch.exp(torch.randn(count, 1, generator=generator))
    return (torch.randn(count, cols, generator=generator) * spread).bfloat16()


def assert_near(out: torch.Tensor, expected: torch.Tensor, mass: torch.Tensor) -> None:
    ulp = torch.exp2(torch.floor(torch.log2(expected.abs().clamp(min=2.0**-126))) - 7)
    worst = ((out.double() - expected).abs() / (ULPS * ulp + FLOAT32_SHARE * mass)).max().item()
    assert worst <= 1, f"worst error is {worst:.2f} times the limit"


@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("activation", MODES)
@pytest.mark.parametrize(
    ("rows", "cols", "count"),
    [((48,), 1024, 1), ((33, 12, 20), 1000, 7), ((5,), 16, 11), ((16,), 1072, 3)],
    ids=["one token", "fused, odd N and K", "too narrow for slices", "two cuts, the last one short"],
)
def test_a_linear_equals_float64(
    linear, ref, activation: str, rows: tuple[int, ...], cols: int, count: int, per_channel: bool
):
    layer, x = linear(activation, rows, cols, per_channel=per_channel), activations(count, cols)
    assert_near(layer(x), *ref.linear(x, layer.stored, rows, layer.scheme))


def test_a_bias_is_added_before_rounding(linear, ref):
    layer, x, bias = linear("per_token", (24, 17), 784), activations(5, 784), torch.randn(41).bfloat16()
    expected, mass = ref.linear(x, layer.stored, layer.rows, layer.scheme)
    assert_near(layer(x, bias), expected + bias.double(), mass + bias.double().abs())


def test_a_row_is_bit_equal_among_1_7_and_64(linear):
    layer, x = linear("per_token", (40,), 1040), activations(64, 1040)
    whole = layer(x)
    assert torch.equal(layer(x[:7]), whole[:7])
    assert torch.equal(layer(x[5:6]), whole[5:6])
    assert torch.equal(layer(x[9:20])[3], whole[12])


def test_codes_give_what_values_give(linear):
    layer, x = linear("per_token", (40,), 784), activations(5, 784)
    rows = FP8Rows(*quantize_fp8(x.to(DEVICE)))
    assert layer.kernel.takes_codes
    assert torch.equal(layer.kernel.multiply(rows, layer.packed).cpu(), layer(x))


def test_more_tokens_take_other_roads(linear, monkeypatch: pytest.MonkeyPatch):
    layer, x = linear("per_token", (40,), 1024), activations(600, 1024)
    monkeypatch.setattr(fp8_gemm, "few_tokens", None)
    middle = layer(x[:65])
    monkeypatch.setattr(fp8_middle, "middle_tokens", None)
    library = layer(x)
    assert ((middle.float() - library[:65].float()).norm() / middle.float().norm()).item() < ROUNDING


def test_wide_or_long_weights_leave_few_tokens_earlier():
    assert [fp8_gemm.most_tokens(rows, 2048) for rows in (2048, 4096, 5120, 28672)] == [32, 32, 16, 16]
    assert [fp8_gemm.most_tokens(2048, cols) for cols in (256, 768, 784, 4096, 14336)] == [0, 0, 32, 32, 16]


def test_no_rows(linear):
    assert linear("per_token", (40,), 64)(activations(0, 64)).shape == (0, 40)


def test_rows_that_are_not_contiguous(linear):
    for activation in MODES:
        layer, x = linear(activation, (16,), 64), activations(64, 4)
        assert torch.equal(layer(x.t()), layer(x.t().contiguous()))


def test_slices_do_not_depend_on_the_tile():
    assert all(fp8_gemm.CUT % tile.depth == 0 for _, tile in fp8_gemm.TILES)


def test_what_it_cannot_compute_is_said():
    def reason(scheme: FP8 | NVFP4, sm: int | None = 90, dtype=torch.bfloat16, libraries=("triton",)) -> str:
        capability = Capability(DEVICE, sm, libraries)
        return TritonFP8Kernel.unsupported(scheme, WeightShape((64,), 64), dtype, capability) or "none"

    assert [reason(FP8(activation=mode)) for mode in MODES] == ["none"] * 3
    assert reason(NVFP4()) == "computes FP8 only"
    assert "stay as they are" in reason(FP8(activation="none"))
    assert "sm100" in reason(FP8(), sm=100)
    assert "cpu" in reason(FP8(), sm=None)
    assert "float16" in reason(FP8(), dtype=torch.float16)
    assert reason(FP8(), libraries=()) == "triton is not installed"


@pytest.mark.gpu
@pytest.mark.parametrize("activation", MODES)
@pytest.mark.parametrize(
    ("rows", "cols"),
    [((4096, 512, 512), 2048), ((3072,), 3072), ((2048,), 14336), ((4090, 7), 4112)],
    ids=["qkv", "square", "long K", "odd"],
)
def test_linears_of_real_size_equal_float64_on_a_gpu(linear, ref, activation: str, rows: tuple[int, ...], cols: int):
    """Every tile; bit-equal among all that the few are, and poisoned outputs."""
    reason = TritonFP8Kernel.unsupported(FP8(), WeightShape(rows, cols), torch.bfloat16, find_capability())
    if reason is not None:
        pytest.skip(reason)
    most = fp8_gemm.most_tokens(sum(rows), cols)
    layer, x = linear(activation, rows, cols), activations(most, cols)
    few = layer(x)
    assert_near(few, *ref.linear(x, layer.stored, rows, layer.scheme))
    if activation == "per_tensor":
        return  # whose scale depends on all rows
    for count in (1, 7, 8, 16, most - 1):
        assert torch.equal(layer(x[:count]), few[:count])


@pytest.mark.parametrize("tokens", [1, 5])
def test_writes_where_it_is_told(linear, tokens):
    """Rows in the middle of a tensor, and nothing beside them."""
    layer = linear("per_token", (48, 32), 64)
    rows, bias = FP8Rows(*quantize_fp8(activations(tokens, 64).to(DEVICE))), activations(1, 80)[0].to(DEVICE)
    whole = torch.full((tokens + 3, 80), 7.0, dtype=torch.bfloat16, device=DEVICE)
    part = whole[2 : 2 + tokens]
    assert layer.kernel.multiply(rows, layer.packed, bias, part).data_ptr() == part.data_ptr()
    assert torch.equal(part, layer.kernel.multiply(rows, layer.packed, bias))
    assert bool((whole[:2] == 7).all() and (whole[2 + tokens :] == 7).all())
