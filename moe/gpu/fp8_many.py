"""Experts' FP8 products for many tokens: tiles move by tensor maps (TMA), and what lies block after block stays so.

A tensor map copies a tile without a pointer for every row: the registers go to larger tiles, or to a second program
beside the first. Only the tokens themselves are gathered row by row. Results are those of `grouped_gemm.py`, bit for
bit: sums run over K in the same order.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...quant.gpu.device import on_own_device
from .grouped_gemm import gated


class ManyTile(NamedTuple):
    """Rows of a weight, depth along K, warps, steps that are loaded ahead, and how many blocks take turns."""

    rows: int
    depth: int
    warps: int
    stages: int
    turns: int


TOKENS = 128  # of a block
GATE_UP = ManyTile(128, 128, 8, 4, 8)
DOWN = ManyTile(256, 128, 8, 3, 8)  # one program a multiprocessor. Measured on an H100: benchmarks/NOTES.md


@triton.jit
def _tile_of(index, row_tiles, num_blocks, TURNS: tl.constexpr):
    """(block, tile of rows) number `index`: TURNS blocks take turns with a tile of rows, then with the next one."""
    width = TURNS * row_tiles
    first = index // width * TURNS
    size = tl.minimum(num_blocks - first, TURNS)
    return first + index % width % size, index % width // size


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def gate_up_blocks(
    x_ptr,
    x_scale_ptr,
    w_map,
    row_scale_ptr,
    out_map,
    sorted_ptr,
    expert_ptr,
    num_pairs,
    num_blocks,
    inner,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    TURNS: tl.constexpr,
):
    """silu(gate) * up: codes x [tokens, K], w [experts * 2 inner, K] -> BF16 [blocks * TOKENS, inner].

    K is known when it is compiled: where a loop may run not once, the compiler lets no two products overlap.
    """
    block, tile = _tile_of(tl.program_id(0), inner // ROWS, num_blocks, TURNS)
    expert = tl.load(expert_ptr + block)
    if expert < 0:
        return
    pair = tl.load(sorted_ptr + block * TOKENS + tl.arange(0, TOKENS))
    token = tl.where(pair < num_pairs, pair // TOP_K, 0)
    row, k = expert * 2 * inner + tile * ROWS, tl.arange(0, DEPTH)
    x_ptr += token.to(tl.int64)[None, :] * K + k[:, None]
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        x = tl.load(x_ptr + step)
        gate = tl.dot(w_map.load([row, step]), x, gate)
        up = tl.dot(w_map.load([row + inner, step]), x, up)
    x_scale = tl.load(x_scale_ptr + token)[None, :]
    row_scale_ptr += row + tl.arange(0, ROWS)
    gate = gate * tl.load(row_scale_ptr)[:, None] * x_scale
    up = up * tl.load(row_scale_ptr + inner)[:, None] * x_scale
    out_map.store([block * TOKENS, tile * ROWS], gated(gate, up).T)


@triton.jit
def down_blocks(
    x_map,
    x_scale_ptr,
    w_map,
    row_scale_ptr,
    out_map,
    expert_ptr,
    used_ptr,
    N,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Codes x [blocks * TOKENS, K], w [experts * N, K] -> BF16 [blocks * TOKENS, N].

    A program takes tile after tile: the next one's first steps are loaded while this one's results are written. The
    results leave in two halves, for which there is room beside the steps.
    """
    num_blocks = tl.load(used_ptr)
    for index in tl.range(tl.program_id(0), num_blocks * (N // ROWS), tl.num_programs(0), flatten=True):
        block, tile = _tile_of(index, N // ROWS, num_blocks, TURNS)
        row = tl.load(expert_ptr + block) * N + tile * ROWS
        total = tl.zeros((TOKENS, ROWS), tl.float32)
        for step in tl.range(0, K, DEPTH, num_stages=STAGES):
            total = tl.dot(x_map.load([block * TOKENS, step]), w_map.load([row, step]).T, total)
        row_scale = tl.load(row_scale_ptr + row + tl.arange(0, ROWS))[None, :]
        total = total * row_scale * tl.load(x_scale_ptr + block * TOKENS + tl.arange(0, TOKENS))[:, None]
        halves = tl.permute(tl.reshape(total.to(tl.bfloat16), (TOKENS, 2, ROWS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        out_map.store([block * TOKENS, tile * ROWS], left)
        out_map.store([block * TOKENS, tile * ROWS + ROWS // 2], right)


@on_own_device
def multiply_gate_up(
    codes: Tensor, scale: Tensor, weight: Tensor, row_scale: Tensor, pairs: Tensor, experts: Tensor, num_pairs: int
) -> Tensor:
    """Codes [tokens, K], weight [num_experts, 2 inner, K], pairs [blocks * TOKENS] -> BF16 [blocks * TOKENS, inner].

    Rows of pairs that do not exist are anything, where no expert owns the block not written at all.
    """
    (_, double, K), tile = weight.shape, GATE_UP
    inner = double // 2
    out = torch.empty(len(pairs), inner, dtype=torch.bfloat16, device=codes.device)
    gate_up_blocks[(len(experts) * (inner // tile.rows),)](
        codes, scale, _map(weight.flatten(0, 1), tile.rows, tile.depth), row_scale, _map(out, TOKENS, tile.rows),
        pairs, experts, num_pairs, len(experts), inner, K,
        TOP_K=num_pairs // len(codes), ROWS=tile.rows, TOKENS=TOKENS, DEPTH=tile.depth, STAGES=tile.stages,
        TURNS=tile.turns, num_warps=tile.warps,
    )  # fmt: skip
    return out


@on_own_device
def multiply_down(
    codes: Tensor, scale: Tensor, weight: Tensor, row_scale: Tensor, experts: Tensor, used: Tensor
) -> Tensor:
    """Codes [blocks * TOKENS, K], weight [num_experts, N, K] -> BF16 [blocks * TOKENS, N], of the blocks in use."""
    (_, N, K), tile = weight.shape, DOWN
    out = torch.empty(len(codes), N, dtype=torch.bfloat16, device=codes.device)
    tiles = len(experts) * (N // tile.rows)
    down_blocks[(min(tiles, _multiprocessors(codes.device)),)](
        _map(codes, TOKENS, tile.depth), scale, _map(weight.flatten(0, 1), tile.rows, tile.depth), row_scale,
        _map(out, TOKENS, tile.rows // 2), experts, used, N, K,
        ROWS=tile.rows, TOKENS=TOKENS, DEPTH=tile.depth, STAGES=tile.stages, TURNS=tile.turns, num_warps=tile.warps,
    )  # fmt: skip
    return out


def _map(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, cols])


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
