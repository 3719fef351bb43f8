"""FP8 attention on Hopper: what `fp8_attention.py` defines, in one launch.

A program computes 128 queries of a head. One warp brings tiles of keys and values; two warp groups, 64 queries each,
multiply them: the scores of one tile, then the values of the tile before. The last tile comes first: it alone may be
short. The tensor cores, which keep few bits of a sum, add within a tile, probabilities too (as a product with ones);
tiles are added in float32.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ....quant.gpu.device import on_own_device
from .. import fp8_attention
from ..fp8_attention import TILE, AttentionCodes

HEAD_DIM = 128
QUERIES = 64  # of a warp group
OPTIONS = {"STAGES": 3, "REGISTERS": 240}  # tiles on their way; registers of a thread that multiplies
LAUNCH = {"num_warps": 4, "maxnreg": 168}  # of the first group; registers of every thread at the start
P_BIAS = gl.constexpr(fp8_attention.P_BIAS)
LEAST_LOG = gl.constexpr(math.log2(fp8_attention.LEAST_RATIO))
ONE = gl.constexpr(0x38)  # of E4M3


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _saturated(x, scale, bias):
    """x * scale + bias, from 0 to 1."""
    return gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, scale, bias], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _bits_of_p(y):
    """float32 y from 0 to 1 -> 8 + y as float16, whose low seven bits are 128 y, rounded."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 both, eight;
        mov.b32 eight, 0x48004800;
        cvt.rn.f16x2.f32 both, $2, $1;
        add.rn.f16x2 $0, both, eight; }""",
        "=r,f,f",
        [y],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _low_bytes(x):
    """Of every float16, four to a word."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [x], dtype=gl.uint8, is_pure=True, pack=4
    )


@gluon.jit
def _tile_at(step, tiles):
    """Which tile comes: the last, the first, the second, ..."""
    return gl.where(step == 0, tiles, step) - 1


@gluon.jit
def _bring(
    q_desc, k_desc, v_desc, q, k, v, q_full, full, empty, q_row, k_row, v_row, tiles,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies: with a tile of keys the values of the tile before."""
    D: gl.constexpr = q_desc.block_type.shape[1]
    for i in gl.static_range(2):
        mbarrier.expect(q_full.index(i), ROWS * D)
        tma.async_copy_global_to_shared(q_desc, [q_row + i * ROWS, 0], q_full.index(i), q.index(i))
    for step in range(tiles + 1):
        stage = step % STAGES
        key, value = _tile_at(step, tiles) * KEYS, _tile_at(step - 1, tiles) * KEYS
        mbarrier.wait(empty.index(stage), (step // STAGES) & 1 ^ 1)
        mbarrier.expect(full.index(stage), KEYS * D, pred=(step == 0) | (step == tiles))
        mbarrier.expect(full.index(stage), 2 * KEYS * D, pred=(step > 0) & (step < tiles))
        tma.async_copy_global_to_shared(k_desc, [k_row + key, 0], full.index(stage), k.index(stage), pred=step < tiles)
        tma.async_copy_global_to_shared(v_desc, [v_row, value], full.index(stage), v.index(stage), pred=step > 0)


@gluon.jit
def _probabilities(s, m, factor):
    """Scores of a tile -> p as `_bits_of_p` gives them, alpha and the new maximum of a row."""
    new_m = gl.maximum(m, gl.max(s, 1) * factor)
    bias = (P_BIAS - new_m) * 0.0625
    y = _saturated(s, gl.full_like(s, 1.0) * (factor * 0.0625), gl.expand_dims(bias, 1) + gl.zeros_like(s))
    return _bits_of_p(y), _exp2(m - new_m), new_m


@gluon.jit
def _codes(p, LAYOUT: gl.constexpr):
    """As the second product reads them: 16 keys in the order of `V_ORDER`, so that nothing moves between threads."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    p = gl.reshape(p, [M, N // 16, 2, 4, 2])
    p = gl.reshape(gl.permute(p, [0, 1, 3, 2, 4]), [M, N])
    return _low_bytes(gl.convert_layout(p, LAYOUT, assert_trivial=True)).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _rescaled(x, factor):
    """x times a factor a row."""
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.jit
def _log_unit(v_scales_ptr, tile, least):
    """log2 of a tile's scale of v."""
    return gl.maximum(_log2(gl.load(v_scales_ptr + tile)), least)


@gluon.jit
def _sums(codes, ones, none):
    """Of the rows of `codes`, in every column."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, none.type.layout, 4)
    codes = gl.convert_layout(codes, LEFT, assert_trivial=True)
    return warpgroup_mma(codes, ones.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _multiply(
    q, k, v, ones, q_full, full, empty, out_ptr, v_scales_ptr, factor, least, tokens, first, tiles, row_stride,
    GROUP: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of the two warp groups. `out` (in units of the scale of v of its last tile) and `total` lack the tile whose
    values are multiplied."""
    ROWS: gl.constexpr = q.shape[1]
    D: gl.constexpr = q.shape[2]
    SUMS: gl.constexpr = ones.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SUMS, 32])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)
    m = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
    out = gl.zeros([ROWS, D], gl.float32, OUT)
    total = gl.zeros([ROWS, SUMS], gl.float32, TOTAL)
    no_s, no_out, no_total = gl.zeros([ROWS, KEYS], gl.float32, SCORES), out, total
    mine = q.index(GROUP)
    log_unit = _log_unit(v_scales_ptr, tiles - 1, least)
    mbarrier.wait(q_full.index(GROUP), 0)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(mine, k.index(0).permute((1, 0)), no_s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    cols = (tiles - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    s = gl.where((cols < tokens)[None, :], s, -float("inf"))
    p, alpha, m = _probabilities(s, m, factor)
    shift = 1.0
    mbarrier.wait(full.index(1 % STAGES), 0)
    for step in range(1, tiles):
        stage = step % STAGES
        before = log_unit
        log_unit = _log_unit(v_scales_ptr, step - 1, least)
        codes = _codes(p, LEFT)
        s = warpgroup_mma(mine, k.index(stage).permute((1, 0)), no_s, use_acc=False, is_async=True)
        part = warpgroup_mma(codes, v.index(stage).permute((1, 0)), no_out, use_acc=False, is_async=True)
        sums = _sums(codes, ones, no_total)
        s = warpgroup_mma_wait(2, deps=[s])
        p, new_alpha, m = _probabilities(s, m, factor)
        mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1)
        part, sums = warpgroup_mma_wait(0, deps=[part, sums])
        mbarrier.arrive(empty.index(stage), count=1)
        out, total = _rescaled(out, alpha * shift) + part, _rescaled(total, alpha) + sums
        alpha, shift = new_alpha, _exp2(before - log_unit)
    codes = _codes(p, LEFT)
    part = warpgroup_mma(codes, v.index(tiles % STAGES).permute((1, 0)), no_out, use_acc=False, is_async=True)
    sums = _sums(codes, ones, no_total)
    part, sums = warpgroup_mma_wait(0, deps=[part, sums])
    out, total = _rescaled(out, alpha * shift) + part, _rescaled(total, alpha) + sums
    out = _rescaled(out, _exp2(log_unit) / gl.max(total, 1))
    rows = first + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    cols = gl.arange(0, D, gl.SliceLayout(0, OUT))
    place = out_ptr + rows.to(gl.int64)[:, None] * row_stride + cols[None, :]
    gl.store(place, out.to(gl.bfloat16), mask=(rows < tokens)[:, None])


@gluon.jit
def _flash_kernel(
    q_desc, k_desc, v_desc, out_ptr, qk_scales_ptr, v_scales_ptr, tokens, num_heads, factor,
    TILES: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """A program 128 queries and a head of a sample. TILES: a power of two that covers all tiles."""
    ROWS: gl.constexpr = q_desc.block_type.shape[0]
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = q_desc.block_type.shape[1]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    first, head = gl.program_id(0) * (2 * ROWS), gl.program_id(1)
    q = gl.allocate_shared_memory(gl.float8e4nv, [2, ROWS, D], q_desc.layout)
    k = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, KEYS, D], k_desc.layout)
    v = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, D, KEYS], v_desc.layout)
    ones = gl.allocate_shared_memory(
        gl.float8e4nv, [8, KEYS], gl.NVMMASharedLayout.get_default_for([8, KEYS], gl.float8e4nv)
    )
    one = gl.full([8, KEYS], ONE, gl.uint8, gl.BlockedLayout([1, 4], [4, 8], [1, 4], [1, 0]))
    ones.store(one.to(gl.float8e4nv, bitcast=True))  # a float32 one, converted, fills half a word only
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # warp groups
    fence_async_shared()
    tiles = (tokens + KEYS - 1) // KEYS
    v_scales_ptr += head * tiles
    tile = gl.arange(0, TILES, gl.BlockedLayout([1], [32], [4], [0]))
    least = _log2(gl.max(gl.load(v_scales_ptr + tile, mask=tile < tiles, other=0.0), 0)) + LEAST_LOG
    factor *= gl.load(qk_scales_ptr) * gl.load(qk_scales_ptr + 1)
    out_ptr += (head // num_heads * tokens).to(gl.int64) * num_heads * D + head % num_heads * D
    gl.warp_specialize([
        (_multiply, (q, k, v, ones, q_full, full, empty, out_ptr, v_scales_ptr, factor, least, tokens, first, tiles,
                     num_heads * D, 0, KEYS, STAGES)),
        (_multiply, (q, k, v, ones, q_full, full, empty, out_ptr, v_scales_ptr, factor, least, tokens, first, tiles,
                     num_heads * D, 1, KEYS, STAGES)),
        (_bring, (q_desc, k_desc, v_desc, q, k, v, q_full, full, empty, head * tokens + first, head * tokens, head * D,
                  tiles, ROWS, KEYS, STAGES)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


def flash_fp8(codes: AttentionCodes) -> Tensor:
    """-> BF16 joint rows [batch * tokens, num_heads * 128]."""
    return _launch(codes.q, codes)


@on_own_device
def _launch(q: Tensor, codes: AttentionCodes) -> Tensor:
    """`q` is that of `codes`."""
    batch, num_heads, tokens, head_dim = q.shape
    assert head_dim == HEAD_DIM
    out = q.new_empty(batch * tokens, num_heads * head_dim, dtype=torch.bfloat16)
    _flash_kernel[(-(-tokens // (2 * QUERIES)), batch * num_heads)](
        _blocks(q, QUERIES, HEAD_DIM), _blocks(codes.k, TILE, HEAD_DIM), _blocks(codes.v, HEAD_DIM, TILE), out,
        codes.qk_scales, codes.v_scales, tokens, num_heads, math.log2(math.e) / math.sqrt(head_dim),
        TILES=max(128, 1 << (codes.v_scales.shape[2] - 1).bit_length()), **OPTIONS, **LAUNCH,
    )  # fmt: skip
    return out


def _blocks(codes: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A matrix of all but the last dimension's rows, brought in blocks [rows, cols]."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], gl.float8e4nv)
    return TensorDescriptor.from_tensor(codes.flatten(0, 2), [rows, cols], layout)
