"""Bytes as FlashInfer's kernels read them: codes, block scales by their byte index, rows behind a shuffle.

Layouts from FlashInfer: `get_sf_out_offset_128x4` and `_8x4` in quantization.cuh, `_compute_swizzled_layout_sf_size` in
quantization/fp4_quantization.py, `get_shuffle_matrix_a_row_indices` in utils.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["linear", "128x4", "8x4"]

GROUP = 16  # elements a block scale covers
ROWS = {"linear": 1, "128x4": 128, "8x4": 8}  # a layout's rows are padded to
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def e4m3_value(byte: int) -> float:
    """One E4M3FN byte: sign, four exponent bits (bias 7), three mantissa bits; 0x7F and 0xFF are NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = torch.tensor([e4m3_value(byte) for byte in range(256)])


def as_bytes(tensor: Tensor) -> Tensor:
    """The same storage as uint8."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def decode_e4m3(tensor: Tensor) -> Tensor:
    """E4M3 bytes -> float32, by table."""
    return E4M3[as_bytes(tensor).long()]


def decode_e2m1(packed: Tensor) -> Tensor:
    """[..., K / 2] bytes -> [..., K] float32; the low nibble is the even k."""
    codes = as_bytes(packed).long()
    return E2M1[torch.stack((codes & 0xF, codes >> 4), dim=-1)].flatten(-2)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def num_scale_bytes(rows: int, columns: int, layout: Layout) -> int:
    """Size of the buffer that holds [rows, columns] scales, padding included."""
    if layout == "linear":
        return rows * columns
    return round_up(rows, ROWS[layout]) * round_up(columns, 4)


def scale_byte_index(rows: int, columns: int, layout: Layout) -> Tensor:
    """[rows, columns] int64: where the byte of scale (m, k) lies in the flat buffer.

    128x4: tiles of 128 rows by 4 columns, 512 bytes each; inside, 32 lines of 16 bytes, a line holding rows
    m, m + 32, m + 64, m + 96. 8x4: tiles of 8 rows by 4 columns, 32 bytes each, row by row.
    """
    m = torch.arange(rows)[:, None]
    k = torch.arange(columns)[None, :]
    tiles = -(-columns // 4)
    if layout == "linear":
        return m * columns + k
    if layout == "128x4":
        return ((m // 128) * tiles + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4
    return ((m // 8) * tiles + k // 4) * 32 + (m % 8) * 4 + k % 4


def read_scales(buffer: Tensor, rows: int, columns: int, layout: Layout) -> Tensor:
    """Buffer of any shape -> [rows, columns] bytes. Raises ValueError where the buffer is of another size."""
    size = num_scale_bytes(rows, columns, layout)
    if buffer.numel() != size:
        raise ValueError(
            f"a {layout} scale buffer of {rows} x {columns} scales holds {size} bytes, not {buffer.numel()} "
            f"(shape {tuple(buffer.shape)})"
        )
    return as_bytes(buffer).reshape(-1)[scale_byte_index(rows, columns, layout)]


def write_scales(scales: Tensor, layout: Layout) -> Tensor:
    """[rows, columns] bytes -> the flat buffer in `layout`, padding zero."""
    rows, columns = scales.shape
    buffer = scales.new_zeros(num_scale_bytes(rows, columns, layout))
    buffer[scale_byte_index(rows, columns, layout).flatten()] = scales.flatten()
    return buffer


def shuffled_from(rows: int, epilogue_tile: int = 128) -> Tensor:
    """[rows] int64: the logical row that lies at each shuffled row. Blocks of 32 rows (16 for small tiles)."""
    block = 32 if epilogue_tile % 128 == 0 else 16
    if rows % block:
        raise ValueError(f"a shuffle of blocks of {block} rows cannot take {rows} rows")
    row = torch.arange(rows)
    within = row % block
    return row - within + (within % 8) * (block // 8) + within // 8


def unshuffle_rows(shuffled: Tensor) -> Tensor:
    """[rows, ...] as the kernel stores them -> logical order."""
    logical = torch.empty_like(shuffled)
    logical[shuffled_from(shuffled.shape[0])] = shuffled
    return logical


def split_gated_rows(shuffled: Tensor) -> tuple[Tensor, Tensor]:
    """[2 * I, ...] of the gated first GEMM -> (x0, x1), [I, ...] each.

    Unshuffled, the even rows are x0 (the top half of what was prepared, "up"), the odd rows x1 ("gate").
    """
    logical = unshuffle_rows(shuffled)
    return logical[0::2], logical[1::2]


def decode_nvfp4(packed: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """[rows, K / 2] codes and their scale buffer -> [rows, K] float32: code * block scale, exact, no global scale."""
    rows, k = packed.shape[0], 2 * packed.shape[1]
    if k % GROUP:
        raise ValueError(f"NVFP4 has one scale for {GROUP} elements; K = {k}")
    by_block = decode_e4m3(read_scales(scales, rows, k // GROUP, layout))
    return decode_e2m1(packed) * by_block.repeat_interleave(GROUP, dim=1)
