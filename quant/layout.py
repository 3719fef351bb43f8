"""Layouts that kernels read, as pure bit permutations, both ways.

Closed forms were checked against FlashInfer's index tables. A layout is never guessed from a shape: a 128x4 tensor
may have as many bytes as a linear one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swap_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes, low nibble = even k <-> high nibble = even k (Black Forest Labs files)."""
    return (codes >> 4) | (codes << 4)


def pad_to(x: Tensor, *, rows: int = 1, cols: int = 1) -> Tensor:
    """Zero-pad the last two dimensions up to multiples of `rows` and `cols`."""
    pad_rows, pad_cols = -x.shape[-2] % rows, -x.shape[-1] % cols
    if not pad_rows and not pad_cols:
        return x
    raw = x.view(torch.uint8) if x.element_size() == 1 else x
    return F.pad(raw, (0, pad_cols, 0, pad_rows)).view(x.dtype)


def swizzle_scales(scales: Tensor, tile_rows: int = 128) -> Tensor:
    """Linear block scales [..., M, K_sf] -> swizzled, zero-padded [..., ceil(M, tile), ceil(K_sf, 4)].

    128x4 tile: byte ((m / 128) * KT + k / 4) * 512 + (m % 32) * 16 + (m % 128 / 32) * 4 + k % 4
    8x4 tile:   byte ((m / 8) * KT + k / 4) * 32 + (m % 8) * 4 + k % 4          KT = K_sf / 4, rounded up
    """
    padded = pad_to(scales, rows=tile_rows, cols=4)
    inner = min(tile_rows, 32)
    tiles = padded.unflatten(-1, (-1, 4)).unflatten(-3, (-1, tile_rows // inner, inner))
    #       [..., tile, m / 32, m % 32, KT, 4] -> [..., tile, KT, m % 32, m / 32, 4]
    return _swap_tile_axes(tiles).reshape(padded.shape)


def _swap_tile_axes(tiles: Tensor) -> Tensor:
    """[..., tile, a, inner, b, 4] -> [..., tile, b, inner, a, 4]: its own inverse."""
    return tiles.transpose(-4, -2)


def unswizzle_scales(swizzled: Tensor, rows: int, cols: int, tile_rows: int = 128) -> Tensor:
    """Inverse of `swizzle_scales`: [..., ceil(rows, tile), ceil(cols, 4)] -> linear [..., rows, cols]."""
    inner = min(tile_rows, 32)
    padded_rows, padded_cols = swizzled.shape[-2:]
    if padded_rows % tile_rows or padded_cols % 4 or padded_rows < rows or padded_cols < cols:
        raise ValueError(f"{tuple(swizzled.shape)} is no {tile_rows}x4 layout of [{rows}, {cols}]")
    lead = swizzled.shape[:-2]
    tiles = swizzled.reshape(*lead, padded_rows // tile_rows, padded_cols // 4, inner, tile_rows // inner, 4)
    return _swap_tile_axes(tiles).reshape(*lead, padded_rows, padded_cols)[..., :rows, :cols].contiguous()


def shuffle_rows_index(rows: int, epilogue_tile: int = 128) -> Tensor:
    """Source row of every row that TRTLLM's `shuffle_matrix_a` writes.

    32-row blocks (tile 128): 0 4 8 ... 28, 1 5 9 ...; 16-row blocks otherwise: 0 2 4 ... 14, 1 3 5 ...
    """
    block = 32 if epilogue_tile % 128 == 0 else 16
    if rows % block:
        raise ValueError(f"row shuffle works on blocks of {block} rows, got {rows} rows")
    step, row = block // 8, torch.arange(rows)
    return (row // block) * block + (row % 8) * step + (row % block) // 8


def gated_reorder_index(rows: int) -> Tensor:
    """Source row of every row of the gated-activation order: top half -> even rows, bottom half -> odd rows."""
    if rows % 2:
        raise ValueError(f"a gated weight has an even number of rows, got {rows}")
    row = torch.arange(rows)
    return row // 2 + (row % 2) * (rows // 2)


def invert_index(index: Tensor) -> Tensor:
    """The permutation that undoes `x[index]`."""
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(index.numel())
    return inverse


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Permute the rows of [..., M, K]; one-byte floats go through their bits."""
    raw = x.view(torch.uint8) if x.element_size() == 1 else x
    return raw.index_select(-2, index.to(x.device)).view(x.dtype)
