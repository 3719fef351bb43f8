"""FP8 products of tens to hundreds of tokens against float64; on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.quant import FP8, FP8Rows, WeightShape, find_capability  # noqa: E402
from rollmill.quant.gpu import fp8_middle  # noqa: E402 (after the conftest's set-up)
from rollmill.quant.gpu.fp8_middle import MIDDLE_TILES, MiddleTile, middle_tile, middle_tokens  # noqa: E402
from rollmill.quant.kernels.torch_fp8 import TorchFP8Kernel  # noqa: E402
from rollmill.quant.kernels.triton_fp8 import TritonFP8Kernel  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ULPS = 2  # of BF16: what a result may differ from float64
# Of the sum of magnitudes: the matrix units keep some 14 bits of the sum of 128 columns, an interpreter float32's.
UNIT_SHARE = 2.0**-14 if torch.cuda.is_available() else 1e-6
SMALL = MiddleTile(64, 32, 128, 3)


def random_codes(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + cols)
    return torch.randn(rows, cols, generator=generator).to(torch.float8_e4m3fn)


class Product:
    """Codes, scales that differ from row to row, and what they make in float64."""

    def __init__(self, tokens: int, rows: int, cols: int, *, each: bool = True, bias: bool = False) -> None:
        self.rows, self.codes = rows, random_codes(tokens, cols)
        self.weight = random_codes(-(-rows // 16) * 16, cols)
        self.scale = torch.rand(tokens) + 0.5 if each else torch.tensor([0.7])
        self.row_scale = torch.rand(len(self.weight)) + 0.5
        self.bias = torch.randn(rows).bfloat16() if bias else None

    def run(self, tile: MiddleTile, tokens: slice = slice(None)) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(DEVICE)
        codes, scale = self.codes[tokens], self.scale[tokens] if len(self.scale) > 1 else self.scale
        moved = [part.to(DEVICE) for part in (codes, scale, self.weight, self.row_scale)]
        return middle_tokens(*moved, self.rows, tile, bias).cpu()

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Results, and sums of magnitudes."""
        codes, weight = self.codes.double(), self.weight[: self.rows].double()
        scales = self.scale.double()[:, None] * self.row_scale[: self.rows].double()
        exact, mass = codes @ weight.t() * scales, codes.abs() @ weight.abs().t() * scales
        return (exact, mass) if self.bias is None else (exact + self.bias.double(), mass + self.bias.double().abs())


def assert_near(out: torch.Tensor, expected: torch.Tensor, mass: torch.Tensor) -> None:
    ulp = torch.exp2(torch.floor(torch.log2(expected.abs().clamp(min=2.0**-126))) - 7)
    worst = ((out.double() - expected).abs() / (ULPS * ulp + UNIT_SHARE * mass)).max().item()
    assert worst <= 1, f"worst error is {worst:.2f} times the limit"


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "each", "bias"),
    [(70, 100, 1040, True, True), (33, 64, 272, False, False), (1, 41, 16, True, False), (64, 128, 512, True, False)],
    ids=["odd, with a bias", "one scale for all", "one token, one block", "even"],
)
def test_a_product_equals_float64(parts: int, tokens: int, rows: int, cols: int, each: bool, bias: bool):
    product = Product(tokens, rows, cols, each=each, bias=bias)
    assert_near(product.run(SMALL._replace(parts=parts)), *product.expected())


def test_no_tokens():
    product = Product(5, 40, 64)
    assert product.run(SMALL, slice(0, 0)).shape == (0, 40)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_row_does_not_depend_on_others_of_its_tile(parts: int):
    product, tile = Product(70, 64, 512), SMALL._replace(parts=parts)
    assert torch.equal(product.run(tile, slice(31, 36)), product.run(tile)[31:36])


def test_products_in_parts_leave_their_counters_as_they_were(monkeypatch: pytest.MonkeyPatch):
    product, tile, used = Product(40, 64, 512), SMALL._replace(parts=2), list[torch.Tensor]()
    taken = fp8_middle.counters
    monkeypatch.setattr(fp8_middle, "counters", lambda *key: used.append(taken(*key)) or used[-1])
    first = product.run(tile)
    assert torch.equal(product.run(tile), first)
    assert len(used) == 2
    assert not any(zeros.any() for zeros in used)


def test_weights_count_apart():
    """Engines that multiply at the same time share none."""
    device = torch.device("cpu")
    assert fp8_middle.counters(device, 64, 3) is fp8_middle.counters(device, 64, 3)
    assert fp8_middle.counters(device, 64, 3) is not fp8_middle.counters(device, 128, 3)


def test_writes_where_it_is_told():
    product = Product(40, 64, 128)
    whole = torch.full((44, 64), 7.0, dtype=torch.bfloat16, device=DEVICE)
    moved = [part.to(DEVICE) for part in (product.codes, product.scale, product.weight, product.row_scale)]
    middle_tokens(*moved, 64, SMALL, out=whole[2:42])
    assert torch.equal(whole[2:42].cpu(), product.run(SMALL))
    assert bool((whole[:2] == 7).all() and (whole[42:] == 7).all())


@pytest.mark.parametrize(
    ("rows", "cols", "tokens", "size"),
    [(5120, 2048, 32, (64, 32, 1)), (4096, 14336, 17, (64, 32, 2)), (5120, 2048, 64, (64, 64, 1)),
     (28672, 4096, 64, (64, 64, 1)), (3072, 3072, 64, (64, 64, 2)), (2048, 4096, 128, (64, 64, 2)),
     (6144, 4096, 128, (64, 64, 1)), (9216, 3072, 128, None), (4096, 4096, 256, (64, 128, 1)),
     (5120, 2048, 256, None), (2048, 4096, 512, (64, 128, 1)), (2048, 4096, 513, None), (2048, 768, 64, None)],
)  # fmt: skip
def test_tiles_keep_the_gpu_busy_or_a_library_does(
    rows: int, cols: int, tokens: int, size: tuple[int, int, int] | None
):
    tile = middle_tile(rows, cols, tokens)
    assert tile is None or tile in MIDDLE_TILES
    assert (tile and (tile.rows, tile.tokens, tile.parts)) == size


GPU_SHAPES = [(5120, 2048), (2048, 4096), (3072, 3072), (4096, 14336), (4112, 4112)]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", MIDDLE_TILES, ids=lambda tile: "x".join(map(str, tile)))
def test_every_tile_equals_float64_on_a_gpu(tile: MiddleTile):
    if (reason := no_hopper()) is not None:
        pytest.skip(reason)
    product = Product(193, 1040, 4112, bias=True)
    assert_near(product.run(tile), *product.expected())


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "cols"), GPU_SHAPES)
def test_the_kernel_equals_the_librarys_to_rounding_on_a_gpu(rows: int, cols: int):
    if (reason := no_hopper()) is not None:
        pytest.skip(reason)
    shape, capability = WeightShape((rows,), cols), find_capability()
    scheme = FP8(per_channel=True)
    ours, library = (kernel(scheme, shape, torch.bfloat16, capability) for kernel in (TritonFP8Kernel, TorchFP8Kernel))
    packed = {"weight": random_codes(rows, cols).to(DEVICE), "row_scale": torch.rand(1, rows, device=DEVICE) + 0.5}
    for count in (33, 64, 100, 128, 200, 256, 300):
        x = FP8Rows(random_codes(count, cols).to(DEVICE), torch.rand(count, device=DEVICE) + 0.5)
        out, expected = ours.multiply(x, packed), library.multiply(x, packed)
        assert ((out.float() - expected.float()).norm() / expected.float().norm()).item() < 2e-3
        assert torch.equal(ours.multiply(x, packed), out)


def no_hopper() -> str | None:
    return TritonFP8Kernel.unsupported(FP8(), WeightShape((64,), 64), torch.bfloat16, find_capability())
