"""The model's reading of bytes against FlashInfer's own CPU code and against torch."""

from __future__ import annotations

import pytest
import torch
from kernel_models import decoding

pytest.importorskip("flashinfer", reason="flashinfer is not installed")


def test_e4m3_is_torch_s() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    expected = every.view(torch.float8_e4m3fn).float()
    assert torch.equal(decoding.decode_e4m3(every).nan_to_num(99), expected.nan_to_num(99))


def test_nvfp4_is_flashinfer_s_cpu_code() -> None:
    from flashinfer.quantization.fp4_quantization import _e2m1_and_ufp8sf_scale_to_float_cpu

    codes = torch.randint(0, 256, (24, 48), dtype=torch.uint8)
    scales = torch.randint(0, 127, (24, 6), dtype=torch.uint8)
    expected = _e2m1_and_ufp8sf_scale_to_float_cpu(codes, scales, torch.ones(1), 16, 1, False)
    assert torch.equal(decoding.decode_nvfp4(codes, scales, "linear"), expected.view(24, 96))


@pytest.mark.parametrize("layout", ["linear", "128x4", "8x4"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 6), (128, 4), (130, 9), (256, 16)])
def test_scales_come_back_from_every_layout(layout: decoding.Layout, rows: int, columns: int) -> None:
    scales = torch.randint(1, 127, (rows, columns), dtype=torch.uint8)
    buffer = decoding.write_scales(scales, layout)
    assert buffer.numel() == decoding.num_scale_bytes(rows, columns, layout)
    assert torch.equal(decoding.read_scales(buffer, rows, columns, layout), scales)
    assert int(buffer.long().sum()) == int(scales.long().sum())  # padding is zero


def test_128x4_is_the_blocked_view() -> None:
    """Tiles of [128, 4] with rows split 4 x 32, as NVIDIA's block-scaled layout is drawn."""
    scales = torch.randint(0, 127, (256, 8), dtype=torch.uint8)
    blocked = scales.view(2, 4, 32, 2, 4).permute(0, 3, 2, 1, 4).flatten()
    assert torch.equal(decoding.write_scales(scales, "128x4"), blocked)


def test_8x4_is_the_blocked_view() -> None:
    scales = torch.randint(0, 127, (16, 12), dtype=torch.uint8)
    blocked = scales.view(2, 8, 3, 4).permute(0, 2, 1, 3).flatten()
    assert torch.equal(decoding.write_scales(scales, "8x4"), blocked)


def test_a_scale_buffer_without_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="128x4 scale buffer"):
        decoding.read_scales(torch.zeros(40, 6, dtype=torch.uint8), 40, 6, "128x4")


@pytest.mark.parametrize("rows", [128, 256, 384])
def test_rows_come_back_from_flashinfer_s_shuffle(rows: int) -> None:
    from flashinfer.quantization.fp4_quantization import shuffle_matrix_a
    from flashinfer.utils import get_shuffle_matrix_a_row_indices

    matrix = torch.randint(0, 256, (rows, 8), dtype=torch.uint8)
    assert torch.equal(decoding.shuffled_from(rows), get_shuffle_matrix_a_row_indices(matrix, 128).long())
    assert torch.equal(decoding.unshuffle_rows(shuffle_matrix_a(matrix, 128)), matrix)


def test_small_tiles_shuffle_blocks_of_16() -> None:
    from flashinfer.utils import get_shuffle_matrix_a_row_indices

    matrix = torch.zeros(64, 8, dtype=torch.uint8)
    assert torch.equal(decoding.shuffled_from(64, 64), get_shuffle_matrix_a_row_indices(matrix, 64).long())


@pytest.mark.parametrize("intermediate", [64, 192])
def test_gated_rows_come_apart_into_up_and_gate(intermediate: int) -> None:
    from flashinfer.fused_moe.core import _maybe_get_cached_w3_w1_permute_indices, reorder_rows_for_gated_act_gemm

    up_gate = torch.randint(0, 256, (2 * intermediate, 8), dtype=torch.uint8)
    shuffled = up_gate[_maybe_get_cached_w3_w1_permute_indices({}, up_gate, 128)]
    up, gate = decoding.split_gated_rows(shuffled)
    assert torch.equal(torch.cat([up, gate]), up_gate)
    reordered = reorder_rows_for_gated_act_gemm(up_gate)
    assert torch.equal(reordered[0::2], up)
    assert torch.equal(reordered[1::2], gate)


def test_down_rows_come_back_from_flashinfer_s_indices() -> None:
    from flashinfer.fused_moe.core import get_w2_permute_indices_with_cache

    matrix = torch.randint(0, 256, (256, 8), dtype=torch.uint8)
    shuffled = matrix[get_w2_permute_indices_with_cache({}, matrix, 128)]
    assert torch.equal(decoding.unshuffle_rows(shuffled), matrix)
