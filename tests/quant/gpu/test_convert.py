"""Weight conversion: bit-equal to the schemes' own quantizers, in stored and in packed layouts, in place."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import FP8, NVFP4, WeightShape
from rollmill.quant.layout import gated_reorder_index, gather_rows, shuffle_rows_index, swizzle_scales

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.quant.gpu import convert  # noqa: E402 (after the conftest's set-up)
from rollmill.quant.gpu.convert import RowOrder, convert_fp8, convert_nvfp4  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STACKS = [(2, 32, 64), (3, 40, 48), (1, 8, 2048)]


def weights(units: int, rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(units + rows + cols)
    w = (torch.randn(units, rows, cols, generator=generator) * 0.02).bfloat16()
    w[0, 0] = 0
    w[0, 1, :16] = -0.0
    w[-1, 2] *= 1e-6
    return w


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), 0xAB, dtype=torch.uint8, device=DEVICE).view(dtype)[..., 0]


def nvfp4_buffers(units: int, rows: int, cols: int) -> list[torch.Tensor]:
    return [
        poisoned(units, rows, cols // 2, dtype=torch.uint8),
        poisoned(units, rows, cols // 16, dtype=torch.float8_e4m3fn),
        poisoned(units, dtype=torch.float32),
    ]


@pytest.fixture(params=["one launch", "two launches"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Units whose programs wait for each other (one a unit in the interpreter, which runs them in turn), or not."""
    if request.param == "one launch":
        monkeypatch.setattr(convert, "MOST_ROWS", 1 << 20)
    else:
        monkeypatch.setattr(convert, "MOST_ROWS", 0)
    return request.param


@pytest.mark.parametrize(("units", "rows", "cols"), STACKS)
def test_nvfp4_equals_the_scheme(units: int, rows: int, cols: int, launches: str):
    w = weights(units, rows, cols)
    stored = NVFP4().quantize(w, WeightShape((rows,), cols, units=units))
    buffers = nvfp4_buffers(units, rows, cols)
    addresses = [buffer.data_ptr() for buffer in buffers]
    for _ in range(2):
        convert_nvfp4(w.to(DEVICE), *buffers)
        assert same_bits(buffers[0], stored["weight"])
        assert same_bits(buffers[1], stored["weight_scale"])
        assert same_bits(buffers[2], stored["weight_scale_2"][:, 0])
    assert [buffer.data_ptr() for buffer in buffers] == addresses


@pytest.mark.parametrize("gated", [False, True], ids=["shuffled", "gated and shuffled"])
def test_packed_rows_and_scales_lie_as_trtllm_wants(gated: bool):
    units, rows, cols = 2, 128, 96
    w = weights(units, rows, cols)
    stored = NVFP4().quantize(w, WeightShape((rows,), cols, units=units))
    index = shuffle_rows_index(rows)
    index = gated_reorder_index(rows)[index] if gated else index
    codes, _, scale_2 = nvfp4_buffers(units, rows, cols)
    scales = torch.zeros(units, rows, 8, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    convert_nvfp4(w.to(DEVICE), codes, scales, scale_2, RowOrder(shuffled=True, gated=gated), tile=128)
    assert same_bits(codes, gather_rows(stored["weight"], index))
    assert same_bits(scales, swizzle_scales(gather_rows(stored["weight_scale"], index)))


@pytest.mark.parametrize("per_row", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize(("units", "rows", "cols"), STACKS)
def test_fp8_equals_the_scheme(units: int, rows: int, cols: int, per_row: bool, launches: str):
    w = weights(units, rows, cols)
    stored = FP8(per_channel=per_row).quantize(w, WeightShape((rows,), cols, units=units))
    codes = poisoned(units, rows, cols, dtype=torch.float8_e4m3fn)
    scale = poisoned(*((units, rows) if per_row else (units,)), dtype=torch.float32)
    convert_fp8(w.to(DEVICE), codes, scale)
    assert same_bits(codes, stored["weight"])
    assert same_bits(scale.flatten(), stored["weight_scale"].flatten())


@pytest.mark.parametrize(
    "shape",
    [WeightShape((32, 16, 16), 64), WeightShape((32, 32), 48, units=3, one_scale=True)],
    ids=["linear", "experts"],
)
@pytest.mark.parametrize("scheme", [FP8(), FP8(per_channel=True), NVFP4()], ids=["fp8", "fp8_channel", "nvfp4"])
def test_schemes_store_the_same_bytes_through_the_kernels(scheme: FP8 | NVFP4, shape: WeightShape):
    w = torch.randn(shape.matrix, generator=torch.Generator().manual_seed(3)).bfloat16()
    plain, kernels = scheme.quantize(w, shape), scheme._quantize_on_gpu(w.to(DEVICE), shape)
    assert plain.keys() == kernels.keys()
    for key, value in plain.items():
        assert kernels[key].shape == value.shape
        assert same_bits(kernels[key], value), key


@pytest.mark.gpu
def test_programs_of_a_unit_wait_for_each_other_and_two_streams_do_not_stop_each_other():
    """Long rows: one program a multiprocessor; half of them are a unit's, so that two conversions always fit."""
    if DEVICE == "cpu":
        pytest.skip("torch sees no GPU")
    w = torch.randn(6, 3072, 12288, device=DEVICE).bfloat16()
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            results.append([convert.nvfp4_weight(w) for _ in range(4)])
    torch.cuda.synchronize()
    stored = NVFP4().quantize(w.cpu(), WeightShape((3072,), 12288, units=6))
    for codes, scales, _ in (one for found in results for one in found):
        assert same_bits(codes, stored["weight"])
        assert same_bits(scales, stored["weight_scale"])


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_weight_that_is_not_finite_shows_in_its_scale(value: float, launches: str):
    w = weights(3, 40, 48)
    w[1, 17, 5] = value
    codes, blocks, scale_2 = nvfp4_buffers(3, 40, 48)
    convert_nvfp4(w.to(DEVICE), codes, blocks, scale_2)
    assert scale_2.isfinite().tolist() == [True, False, True]
    for scale in (poisoned(3, dtype=torch.float32), poisoned(3, 40, dtype=torch.float32)):
        convert_fp8(w.to(DEVICE), poisoned(3, 40, 48, dtype=torch.float8_e4m3fn), scale)
        found = scale.isfinite()
        assert found.view(3, -1).all(1).tolist() == [True, False, True]
        assert scale.ndim == 1 or (~found).nonzero().tolist() == [[1, 17]]
