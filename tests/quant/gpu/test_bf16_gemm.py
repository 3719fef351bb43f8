"""BF16 products whose rows do not depend on each other, against float64; on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import BF16, Capability, UnsupportedError, WeightShape, find_capability, select_matmul
from rollmill.quant.kernels.triton_bf16 import TritonBF16Kernel

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.moe.gpu.router import multiply_router  # noqa: E402 (after the conftest's set-up)
from rollmill.quant.gpu.bf16_gemm import FEW_TILES, MANY_TILES, bf16_matmul, choose_tile  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = [*(tile for _, tile in FEW_TILES), *MANY_TILES]
SHAPES = [(3, 40, 160), (40, 70, 520), (70, 136, 1024), (33, 24, 96), (17, 30, 1296)]
each_tile = pytest.mark.parametrize("tile", [*TILES, None], ids=str)


def draw(*shape: int, seed: int = 0, integers: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, shape, generator=generator) if integers else torch.randn(shape, generator=generator)
    return values.bfloat16().to(DEVICE)


@each_tile
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_products(shape, bias, tile):
    M, N, K = shape
    x, weight, added = draw(M, K), draw(N, K, seed=1), draw(N, seed=2) if bias else None
    expected = x.double() @ weight.double().T + (added.double() if bias else 0)
    out = bf16_matmul(x, weight, added, tile)
    assert out.shape == (M, N)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() < 3e-3 * expected.norm()


@each_tile
def test_exact_sums_are_rounded_once(tile):
    """Sums of small integers are exact in any order, so that every tile must give float64's result, rounded."""
    x, weight = draw(50, 712, integers=True), draw(77, 712, seed=1, integers=True)
    assert torch.equal(bf16_matmul(x, weight, None, tile), (x.double() @ weight.double().T).bfloat16())


def test_no_rows():
    assert bf16_matmul(draw(0, 64), draw(5, 64)).shape == (0, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5120, 2048), (2048, 4096), (1000, 1184), (128, 2048), (1, 512)], ids=str)
def test_bits_do_not_depend_on_the_other_rows(shape):
    """Through all tiles, those of the router's kernel among them."""
    _skip_unless_hopper()
    N, K = shape
    x, weight = draw(900, K), draw(N, K, seed=1)
    whole = bf16_matmul(x, weight)
    for count in (1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 900):
        assert torch.equal(bf16_matmul(x[-count:], weight), whole[-count:]), count
    for tile in TILES:
        assert torch.equal(bf16_matmul(x[:300], weight, None, tile), whole[:300]), tile
    assert torch.equal(multiply_router(x[:300], weight), whole[:300])


def _skip_unless_hopper() -> None:
    try:
        capability = find_capability("cuda")
    except UnsupportedError as error:
        pytest.skip(str(error))
    reason = TritonBF16Kernel.unsupported(BF16, WeightShape((64,), 64), torch.bfloat16, capability)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("num_tokens", [1, 8, 20, 33, 100, 256, 8192])
@pytest.mark.parametrize("num_rows", [128, 2048, 151936])
def test_tiles_keep_a_gpu_busy_or_are_small(num_rows, num_tokens):
    tile = choose_tile(num_rows, num_tokens)
    programs = -(-num_rows // tile.rows) * -(-num_tokens // tile.tokens)
    assert programs >= 132 or tile.rows <= 64


def test_products_of_another_dtype_or_gpu_are_refused():
    hopper = Capability(torch.device("meta"), 90, ("triton",))
    assert select_matmul(hopper, torch.bfloat16, batch_invariant=True) is bf16_matmul
    with pytest.raises(UnsupportedError, match=r"torch\.float32"):
        select_matmul(hopper, torch.float32, batch_invariant=True)
    with pytest.raises(UnsupportedError, match="sm90, this is sm100"):
        select_matmul(Capability(torch.device("meta"), 100, ("triton",)), torch.bfloat16, batch_invariant=True)
