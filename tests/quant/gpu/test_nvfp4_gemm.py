"""Dense NVFP4 in Triton, W4A16 and the twin of W4A4, against float64; on a GPU or in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rollmill.quant import NVFP4, Capability, WeightShape, find_capability
from rollmill.quant.kernels.nvfp4_packing import DEPTH, NVFP4Packer, ue5m3
from rollmill.quant.kernels.triton_nvfp4 import TritonNVFP4Kernel

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.quant.gpu import nvfp4_gemm  # noqa: E402 (after the conftest's set-up)
from rollmill.quant.gpu.nvfp4_pack import pack_nvfp4  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = Capability(DEVICE, 90, ("triton",))
SCHEME = NVFP4()
MODES = ["none", "per_token", "static"]
ULPS = 2  # of BF16: what a result may differ from float64
FLOAT32_SHARE = 1e-6  # of the sum of magnitudes: what float32 sums may lose


class Linear:
    """A weight as stored, packed, and bound to the kernel; `scale_2` spreads the shards' global scales apart."""

    def __init__(self, activation: str, rows: tuple[int, ...], cols: int, stored: dict[str, torch.Tensor]) -> None:
        self.scheme, self.rows, self.stored = NVFP4(activation=activation), rows, stored
        self.kernel = TritonNVFP4Kernel(self.scheme, WeightShape(rows, cols), torch.bfloat16, HOPPER)
        matrices = {name: stored[name] for name in self.scheme.matrices(self.kernel.shape)}
        scales = {name: stored[name] for name in self.scheme.scales(self.kernel.shape)}
        packed = self.kernel.prepare(matrices) | self.kernel.derive(scales)
        assert {k: (tuple(v.shape), v.dtype) for k, v in packed.items()} == {
            k: (spec.shape, spec.dtype) for k, spec in self.kernel.packed().items()
        }
        self.packed = {key: value.to(DEVICE) for key, value in packed.items()}

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.kernel.apply(x.to(DEVICE), self.packed, None if bias is None else bias.to(DEVICE)).cpu()


@pytest.fixture
def linear(random_stored):
    """`linear(activation, rows, cols)`: shards with unequal global and input scales."""

    def make(activation: str, rows: tuple[int, ...], cols: int) -> Linear:
        stored = dict(random_stored(NVFP4(activation=activation), rows, cols))
        apart = torch.tensor([1.0, 2.5, 0.3])[: len(rows)]
        for name in ("weight_scale_2", "input_scale"):
            if name in stored:
                stored[name] = stored[name] * apart
        return Linear(activation, rows, cols, stored)

    return make


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args, **options) -> torch.Tensor:
            new = make(*args, **options)
            return new.fill_(torch.nan) if new.dtype == torch.bfloat16 else new

        return poisoned

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))


@pytest.fixture(params=["few", "middle", "many"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Weights widened for every product, by either matrix instruction, or decoded first, as for many tokens."""
    if request.param != "few":
        monkeypatch.setattr(nvfp4_gemm, "FEW", 0)
        monkeypatch.setattr(nvfp4_gemm, "MULTIPROCESSORS", 0)
    if request.param == "many":
        monkeypatch.setattr(nvfp4_gemm, "MIDDLE", 0)
    return request.param


def activations(count: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count + cols)
    spread = torch.exp(torch.randn(count, 1, generator=generator))
    return (torch.randn(count, cols, generator=generator) * spread).bfloat16()


def assert_near(out: torch.Tensor, expected: torch.Tensor, mass: torch.Tensor) -> None:
    ulp = torch.exp2(torch.floor(torch.log2(expected.abs().clamp(min=2.0**-126))) - 7)
    worst = ((out.double() - expected).abs() / (ULPS * ulp + FLOAT32_SHARE * mass)).max().item()
    assert worst <= 1, f"worst error is {worst:.2f} times the limit"


@pytest.mark.parametrize("activation", MODES)
@pytest.mark.parametrize(
    ("rows", "cols", "count"),
    [((48,), 128, 1), ((33, 12, 20), 272, 7), ((64,), 1024, 17), ((5,), 16, 3)],
    ids=["one token", "fused, odd N and K", "eight slices", "one block"],
)
def test_a_linear_equals_float64(linear, ref, path: str, activation: str, rows: tuple[int, ...], cols: int, count: int):
    layer, x = linear(activation, rows, cols), activations(count, cols)
    assert_near(layer(x), *ref.linear(x, layer.stored, rows, layer.scheme))


@pytest.mark.parametrize("activation", MODES)
def test_a_bias_is_added_before_rounding(linear, ref, path: str, activation: str):
    rows, cols = (24, 17), 144
    layer, x = linear(activation, rows, cols), activations(5, cols)
    bias = torch.randn(41).bfloat16()
    expected, mass = ref.linear(x, layer.stored, rows, layer.scheme)
    assert_near(layer(x, bias), expected + bias.double(), mass + bias.double().abs())


@pytest.mark.parametrize("activation", MODES)
def test_a_row_is_bit_equal_among_1_7_and_64(linear, activation: str, monkeypatch: pytest.MonkeyPatch):
    if DEVICE.type == "cpu":  # where a product of other columns may sum in another order
        monkeypatch.setattr(nvfp4_gemm, "FEW", 64)
    layer, x = linear(activation, (40,), 512), activations(64, 512)
    whole = layer(x)
    assert torch.equal(layer(x[:7]), whole[:7])
    assert torch.equal(layer(x[5:6]), whole[5:6])
    assert torch.equal(layer(x[20:45])[3], whole[23])


def test_many_rows_do_not_depend_on_each_other(linear, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nvfp4_gemm, "FEW", 0)
    monkeypatch.setattr(nvfp4_gemm, "MIDDLE", 0)
    layer, x = linear("per_token", (40,), 256), activations(9, 256)
    assert torch.equal(layer(x[3:4]), layer(x)[3:4])


def test_no_rows(linear):
    assert linear("per_token", (40,), 64)(activations(0, 64)).shape == (0, 40)


def test_rows_that_are_not_contiguous(linear):
    layer, x = linear("none", (16,), 64), activations(4, 128)
    assert torch.equal(layer(x[:, :64]), layer(x[:, :64].contiguous()))


@pytest.mark.parametrize("activation", MODES)
def test_float32_inputs_are_quantized_as_they_are(linear, ref, activation: str):
    layer, x = linear(activation, (33,), 144), torch.randn(5, 144, generator=torch.Generator().manual_seed(5))
    seen = x.bfloat16() if activation == "none" else x
    assert_near(layer(x), *ref.linear(seen, layer.stored, (33,), layer.scheme))


def test_a_block_scale_of_zero_makes_zeros(linear):
    layer = linear("none", (16,), 64)
    stored = dict(layer.stored)
    scales = stored["weight_scale"].view(torch.uint8).clone()
    scales[3] = 0
    layer = Linear("none", (16,), 64, stored | {"weight_scale": scales.view(torch.float8_e4m3fn)})
    out = layer(activations(2, 64))
    assert torch.equal(out[:, 3], torch.zeros(2, dtype=torch.bfloat16))
    assert bool((out[:, :3] != 0).all())


def test_every_code_and_scale_is_exact():
    """Row n of the weight has scale n everywhere, place k of x picks one code."""
    scales = torch.arange(1, 127, dtype=torch.uint8)
    codes = torch.arange(DEPTH) % 16
    weight = (codes[0::2] | (codes[1::2] << 4)).to(torch.uint8).expand(126, -1).contiguous()
    stored = {
        "weight": weight,
        "weight_scale": scales[:, None].expand(-1, DEPTH // 16).contiguous().view(torch.float8_e4m3fn),
        "weight_scale_2": torch.ones(1),
    }
    out = Linear("none", (126,), DEPTH, stored)(torch.eye(DEPTH).bfloat16())
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
    assert torch.equal(out.float(), values[:, None] * scales.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("lead", [(), (2,)], ids=["linear", "stack"])
@pytest.mark.parametrize(("rows", "cols"), [(33, 272), (5, 16), (64, 256)])
def test_packing_in_one_launch_writes_the_same_bytes(lead: tuple[int, ...], rows: int, cols: int):
    generator = torch.Generator().manual_seed(cols)
    codes = torch.randint(0, 256, (*lead, rows, cols // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 127, (*lead, rows, cols // 16), generator=generator, dtype=torch.uint8)
    scales[..., 3, 0] = 0
    stored = {"weight": codes, "weight_scale": scales.view(torch.float8_e4m3fn)}
    packer = NVFP4Packer(SCHEME, WeightShape((rows,), cols, units=lead[0] if lead else None))
    weight, block_scale = pack_nvfp4(codes.to(DEVICE), stored["weight_scale"].to(DEVICE))
    packed = packer.prepare(stored)
    assert torch.equal(weight.cpu(), packed["weight"])
    assert torch.equal(block_scale.cpu(), packed["block_scale"])


def test_every_e4m3_scale_is_exact_as_ue5m3():
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    bits = ue5m3(scales).int()
    assert torch.equal(torch.exp2((bits >> 3).float() - 12) * (1 + (bits & 7) / 8), scales.float())


def test_what_it_cannot_compute_is_said():
    def reason(scheme=SCHEME, sm: int | None = 90, dtype=torch.bfloat16, libraries=("triton",)) -> str:
        capability = Capability(DEVICE, sm, libraries)
        return TritonNVFP4Kernel.unsupported(scheme, WeightShape((64,), 64), dtype, capability) or "none"

    assert [reason(NVFP4(activation=mode)) for mode in MODES] == ["none"] * 3
    assert "per tensor" in reason(NVFP4(activation="per_tensor"))
    assert "sm100" in reason(sm=100)
    assert "cpu" in reason(sm=None)
    assert "float32" in reason(dtype=torch.float32)
    assert reason(libraries=()) == "triton is not installed"


@pytest.mark.parametrize(
    ("rows", "tokens", "tile"),
    [(2048, 128, None), (2048, 200, (64, 32)), (5120, 64, (64, 32)), (5120, 256, (64, 64)), (28672, 64, (128, 64)),
     (28672, 100, (128, 128)), (4096, 512, (128, 128))],
)  # fmt: skip
def test_middle_tiles_are_as_many_as_keep_the_gpu_busy(rows: int, tokens: int, tile: tuple[int, int] | None):
    found = nvfp4_gemm.middle_tile(rows, tokens)
    assert (found and (found.rows, found.tokens)) == tile


@pytest.mark.parametrize(
    ("rows", "tokens", "stages"),
    [(4096, 1, 4), (5120, 1, 3), (12288, 8, 3), (28672, 1, 4), (4096, 16, 3), (2048, 40, 2)],
)
def test_programs_that_share_a_multiprocessor_load_less_ahead(rows: int, tokens: int, stages: int):
    assert nvfp4_gemm.few_tile(rows, tokens).stages == stages


GPU_SHAPES = [((4096, 512, 512), 2048), ((3072,), 3072), ((4090, 7), 4112)]


@pytest.mark.gpu
@pytest.mark.parametrize("activation", MODES)
@pytest.mark.parametrize(("rows", "cols"), GPU_SHAPES, ids=["qkv", "square", "odd"])
def test_linears_of_real_size_equal_float64_on_a_gpu(linear, ref, activation: str, rows: tuple[int, ...], cols: int):
    """Every tile: rows up to the few and beyond; bit-equal among all that the few are, and among the many."""
    reason = TritonNVFP4Kernel.unsupported(SCHEME, WeightShape(rows, cols), torch.bfloat16, find_capability())
    if reason is not None:
        pytest.skip(reason)
    layer, x = linear(activation, rows, cols), activations(1100, cols)
    expected, mass = ref.linear(x, layer.stored, rows, layer.scheme)
    few, many = layer(x[: nvfp4_gemm.MIDDLE]), layer(x)
    assert_near(few, expected[: len(few)], mass[: len(few)])
    assert_near(many, expected, mass)
    for count in (1, 7, 16, 64, 200):
        assert torch.equal(layer(x[:count]), few[:count])
    for count in (nvfp4_gemm.MIDDLE + 1, 700):
        assert torch.equal(layer(x[:count]), many[:count])
