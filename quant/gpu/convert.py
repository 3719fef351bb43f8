"""BF16 weights -> stored or packed NVFP4 and FP8: whole stacks of units in one launch, read once from memory.

Scales need the amax of a whole unit before its first code. The programs of one unit read their rows, tell each other
the amax, wait, and read the rows again, from the L2. They take units in the order in which they start, and no unit has
more programs than half of the GPU's multiprocessors: whoever waits, waits for programs that run, even while a second
conversion does the same on another stream. (More than two at once, or a foreign kernel that holds most of the GPU and
waits for this one, could still stop it.)

A weight that is not finite makes the decode scale of its unit (or row) NaN or infinite: its bits are the largest.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from msgspec import Struct
from torch import Tensor

from ..numerics import E4M3_MAX, NVFP4_MAX
from .device import on_own_device
from .floats import E4M3_MIN, LEAST_SCALE, e2m1_code, pack_codes, quotient, scale_offset

TILE = 4096  # elements that a program computes at a time
THREAD_TILE = 512  # of those, of a warp
MOST_ROWS = 64  # of a program that waits for others


class RowOrder(Struct, frozen=True):
    """Which stored row a packed row holds: `shuffled` as TRTLLM's 128-row epilogue wants, `gated` halves interleaved.

    stored: g0 g1 g2 ... u0 u1 u2 ...   gated: g0 u0 g1 u1 ...   shuffled: 0 4 8 ... 28, 1 5 9 ... of every 32
    """

    shuffled: bool = False
    gated: bool = False


AS_STORED = RowOrder()


@triton.jit
def _packed_row(row, num_rows, SHUFFLED: tl.constexpr, GATED: tl.constexpr):
    """Where a stored row goes: the inverse of the indices in `layout.py`."""
    if GATED:
        half = num_rows // 2
        row = row % half * 2 + row // half
    if SHUFFLED:
        row = row // 32 * 32 + row % 4 * 8 + row % 32 // 4
    return row


@triton.jit
def _load_rows(w_ptr, unit, rows, num_rows, K, BLOCK_K: tl.constexpr, CACHE: tl.constexpr):
    """BF16 [rows, BLOCK_K] of one unit; zeros outside."""
    cols = tl.arange(0, BLOCK_K)
    mask = (rows < num_rows)[:, None] & (cols < K)[None, :]
    offset = (unit * num_rows + rows.to(tl.int64))[:, None] * K + cols[None, :]
    return tl.load(w_ptr + offset, mask=mask, other=0.0, eviction_policy=CACHE)


@triton.jit
def _part_amax(w_ptr, unit, part, num_rows, K, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr):
    """max |w| of one part of a unit, as the bits of a BF16 (int32): without the sign BF16 order as their bits do."""
    largest = tl.zeros((STEP, BLOCK_K), tl.int16)
    for step in range(0, ROWS, STEP):
        w = _load_rows(w_ptr, unit, part * ROWS + step + tl.arange(0, STEP), num_rows, K, BLOCK_K, "evict_last")
        largest = tl.maximum(largest, w.to(tl.int16, bitcast=True) & 0x7FFF)
    return tl.max(tl.max(largest.to(tl.int32), axis=1), axis=0)


@triton.jit
def _amax_kernel(w_ptr, amax_ptr, num_rows, K, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr):
    """A launch of its own, for units with more programs than can wait for each other."""
    unit = tl.program_id(1).to(tl.int64)
    tl.atomic_max(amax_ptr + unit, _part_amax(w_ptr, unit, tl.program_id(0), num_rows, K, ROWS, STEP, BLOCK_K))


@triton.jit
def _unit_amax(
    w_ptr,
    unit,
    part,
    amax_ptr,
    count_ptr,
    num_rows,
    K,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
):
    """The unit's amax (float32): once all its programs have told theirs, where they find it themselves."""
    if ONE_LAUNCH:
        largest = _part_amax(w_ptr, unit, part, num_rows, K, ROWS, STEP, BLOCK_K)
        tl.atomic_max(amax_ptr + unit, largest, sem="release")
        told = tl.atomic_add(count_ptr + unit, 1, sem="acq_rel") + 1
        while told < PROGRAMS:
            told = tl.atomic_add(count_ptr + unit, 0, sem="acquire")
        bits = tl.atomic_max(amax_ptr + unit, 0, sem="acquire")
    else:
        bits = tl.load(amax_ptr + unit)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _place(ticket_ptr, PROGRAMS: tl.constexpr, ONE_LAUNCH: tl.constexpr):
    """(unit, part of the unit) of this program: in the order of starting where programs wait for each other."""
    if ONE_LAUNCH:
        ticket = tl.atomic_add(ticket_ptr, 1)
    else:
        ticket = tl.program_id(0)
    return (ticket // PROGRAMS).to(tl.int64), ticket % PROGRAMS


@triton.jit
def _nvfp4_kernel(
    w_ptr,
    codes_ptr,
    scales_ptr,
    global_ptr,
    ticket_ptr,
    amax_ptr,
    count_ptr,
    num_rows,
    K,
    code_max,
    scale_stride,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
    LAYOUT: tl.constexpr,
    SHUFFLED: tl.constexpr,
    GATED: tl.constexpr,
):
    unit, part = _place(ticket_ptr, PROGRAMS, ONE_LAUNCH)
    amax = _unit_amax(w_ptr, unit, part, amax_ptr, count_ptr, num_rows, K, ROWS, STEP, BLOCK_K, PROGRAMS, ONE_LAUNCH)
    scale_2 = tl.div_rn(amax, code_max)
    scale_2 = tl.where(scale_2 == 0, 1.0, scale_2)
    if part == 0:
        tl.store(global_ptr + unit, scale_2)
    word, block = tl.arange(0, BLOCK_K // 8)[None, :], tl.arange(0, BLOCK_K // 16)[None, :]
    for step in range(0, ROWS, STEP):
        rows = part * ROWS + step + tl.arange(0, STEP)  # as stored; `packed` is where they go
        w = _load_rows(w_ptr, unit, rows, num_rows, K, BLOCK_K, "evict_first")
        codes, scales = _nvfp4_rows(w, scale_2, STEP, BLOCK_K)
        packed = _packed_row(rows, num_rows, SHUFFLED, GATED).to(tl.int64)[:, None]
        inside = (rows < num_rows)[:, None]
        target = codes_ptr + (unit * num_rows + packed) * (K // 8) + word
        tl.store(target, codes, mask=inside & (word < K // 8))
        offset = unit * scale_stride + scale_offset(packed, block, K // 16, LAYOUT)
        tl.store(scales_ptr + offset, scales, mask=inside & (block < K // 16))


@triton.jit
def _nvfp4_rows(w, scale_2, STEP: tl.constexpr, BLOCK_K: tl.constexpr):
    """BF16 [STEP, BLOCK_K] -> codes int32 [STEP, BLOCK_K // 8], block scales uint8 [STEP, BLOCK_K // 16]."""
    blocks = tl.reshape(w.to(tl.float32), (STEP, BLOCK_K // 16, 16))
    block_amax = tl.max(tl.abs(blocks), axis=2)
    scale = tl.div_rn(block_amax, 6.0 * scale_2 + block_amax * 0)
    scale = tl.minimum(tl.where(scale == 0, 1.0, tl.maximum(scale, E4M3_MIN)), 448.0).to(tl.float8e4nv)
    divisor = scale.to(tl.float32) * scale_2
    if scale_2 >= LEAST_SCALE:
        values = quotient(blocks, divisor[:, :, None], tl.div_rn(1.0 + divisor * 0, divisor)[:, :, None])
    else:
        values = tl.div_rn(blocks, tl.broadcast_to(divisor[:, :, None], blocks.shape))
    codes = e2m1_code(values + 0.0, False)  # ModelOpt gives -0 the code of +0
    return pack_codes(tl.reshape(codes, (STEP, BLOCK_K)), STEP, BLOCK_K), scale.to(tl.uint8, bitcast=True)


@triton.jit
def _fp8_kernel(
    w_ptr,
    codes_ptr,
    global_ptr,
    ticket_ptr,
    amax_ptr,
    count_ptr,
    num_rows,
    K,
    code_max,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    unit, part = _place(ticket_ptr, PROGRAMS, ONE_LAUNCH)
    unit_scale = 1.0
    if not PER_ROW:
        amax = _unit_amax(
            w_ptr, unit, part, amax_ptr, count_ptr, num_rows, K, ROWS, STEP, BLOCK_K, PROGRAMS, ONE_LAUNCH
        )
        unit_scale = tl.div_rn(amax, code_max)
        unit_scale = tl.where(unit_scale == 0, 1.0, unit_scale)
        if part == 0:
            tl.store(global_ptr + unit, unit_scale)
    cols = tl.arange(0, BLOCK_K)[None, :]
    for step in range(0, ROWS, STEP):
        rows = part * ROWS + step + tl.arange(0, STEP)
        w = _load_rows(w_ptr, unit, rows, num_rows, K, BLOCK_K, "evict_first")
        x = w.to(tl.float32)
        if PER_ROW:
            bits = tl.max((w.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32), axis=1)
            amax = (bits << 16).to(tl.float32, bitcast=True)
            scale = tl.div_rn(amax, code_max + tl.zeros((STEP,), tl.float32))
            scale = tl.where(scale == 0, 1.0, scale)
            tl.store(global_ptr + unit * num_rows + rows, scale, mask=rows < num_rows)
        else:
            scale = unit_scale + tl.zeros((STEP,), tl.float32)
        if tl.min(scale, axis=0) >= LEAST_SCALE:
            values = quotient(x, scale[:, None], tl.div_rn(1.0 + scale * 0, scale)[:, None])
        else:
            values = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        values = tl.clamp(values, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        if not PER_ROW:
            values = values.to(tl.bfloat16).to(tl.float32)  # ModelOpt's quotient is BF16
        target = (unit * num_rows + rows.to(tl.int64))[:, None] * K + cols
        tl.store(codes_ptr + target, values.to(tl.float8e4nv), mask=(rows < num_rows)[:, None] & (cols < K))


class Tiling(Struct, frozen=True):
    """`programs` of `rows` rows make one unit, `step` rows at a time; `one_launch`: they can all run at once."""

    rows: int
    step: int
    block_k: int
    programs: int
    one_launch: bool
    warps: int


def make_tiling(num_rows: int, K: int, most_programs: int) -> Tiling:
    """Few rows at a time, so that many programs fit a multiprocessor; no unit has more programs than `most_programs`,
    unless it is too large for any to wait."""
    block_k = max(16, _power_of_two(K))
    step = max(1, TILE // block_k)
    rows = max(step, _power_of_two(-(-num_rows // most_programs)))
    one_launch = rows <= MOST_ROWS
    rows = rows if one_launch else 4 * step
    return Tiling(rows, step, block_k, -(-num_rows // rows), one_launch, max(1, min(16, step * block_k // THREAD_TILE)))


@on_own_device
def convert_nvfp4(
    weight: Tensor, codes: Tensor, scales: Tensor, scale_2: Tensor, order: RowOrder = AS_STORED, tile: int = 0
) -> None:
    """BF16 [units, N, K] -> codes uint8 [units, N, K / 2], block scales, decode scales float32 [units]; in place.

    One amax a unit. `scales`: E4M3 [units, N, K / 16], or with `tile` 128 [units, ceil(N, 128), ceil(K / 16, 4)],
    swizzled. ModelOpt's recipe: bit-equal to `numerics.quantize_nvfp4_weight`, rows in `order`.
    """
    units, num_rows, K = weight.shape
    tiling, state = _prepare(weight)
    _nvfp4_kernel[(units * tiling.programs,)](
        weight,
        codes.view(torch.int32),
        scales.view(torch.uint8),
        scale_2,
        *state,
        num_rows,
        K,
        NVFP4_MAX,
        scales[0].numel(),
        ROWS=tiling.rows,
        STEP=tiling.step,
        BLOCK_K=tiling.block_k,
        PROGRAMS=tiling.programs,
        ONE_LAUNCH=tiling.one_launch,
        LAYOUT=tile,
        SHUFFLED=order.shuffled,
        GATED=order.gated,
        num_warps=tiling.warps,
    )


@on_own_device
def convert_fp8(weight: Tensor, codes: Tensor, scale: Tensor) -> None:
    """BF16 [units, N, K] -> E4M3 codes of the same shape, decode scales float32 [units] or [units, N]; in place.

    Bit-equal to `numerics.quantize_fp8`, with a BF16 quotient where a unit has one scale.
    """
    units, num_rows, K = weight.shape
    per_row = scale.ndim == 2
    tiling, state = _prepare(weight, needs_amax=not per_row)
    _fp8_kernel[(units * tiling.programs,)](
        weight,
        codes,
        scale,
        *state,
        num_rows,
        K,
        E4M3_MAX,
        ROWS=tiling.rows,
        STEP=tiling.step,
        BLOCK_K=tiling.block_k,
        PROGRAMS=tiling.programs,
        ONE_LAUNCH=tiling.one_launch and not per_row,
        PER_ROW=per_row,
        num_warps=tiling.warps,
    )


def _prepare(weight: Tensor, *, needs_amax: bool = True) -> tuple[Tiling, tuple[Tensor, Tensor, Tensor]]:
    """The tiling, and zeroed (ticket, amax, count); the amax is there already where one launch cannot find it."""
    units, num_rows, K = weight.shape
    multiprocessors = torch.cuda.get_device_properties(weight.device).multi_processor_count if weight.is_cuda else 1
    tiling = make_tiling(num_rows, K, max(1, multiprocessors // 2))
    state = torch.zeros(1 + 2 * units, dtype=torch.int32, device=weight.device)
    ticket, amax, count = state[:1], state[1 : 1 + units], state[1 + units :]
    if needs_amax and not tiling.one_launch:
        _amax_kernel[(tiling.programs, units)](
            weight,
            amax,
            num_rows,
            K,
            ROWS=tiling.rows,
            STEP=tiling.step,
            BLOCK_K=tiling.block_k,
            num_warps=tiling.warps,
        )
    return tiling, (ticket, amax, count)


def nvfp4_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BF16 [units, N, K] -> codes uint8 [units, N, K / 2], E4M3 scales [units, N, K / 16], float32 [units]."""
    units, num_rows, K = weight.shape
    codes = torch.empty(units, num_rows, K // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(units, num_rows, K // 16, dtype=torch.float8_e4m3fn, device=weight.device)
    scale_2 = torch.empty(units, device=weight.device)
    convert_nvfp4(weight.contiguous(), codes, scales, scale_2)
    return codes, scales, scale_2


def fp8_weight(weight: Tensor, *, per_row: bool) -> tuple[Tensor, Tensor]:
    """BF16 [units, N, K] -> E4M3 codes [units, N, K], decode scales float32 [units], or [units, N]."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(weight.shape[: 2 if per_row else 1], device=weight.device)
    convert_fp8(weight.contiguous(), codes, scale)
    return codes, scale


def _power_of_two(count: int) -> int:
    """The next one."""
    return 1 << (count - 1).bit_length()
