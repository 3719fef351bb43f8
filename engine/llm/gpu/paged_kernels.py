"""Attention over the paged cache whose bits depend on nothing but a token and those before it.

Keys are taken in blocks of 64, and blocks in parts of `PART` keys that begin at multiples of it. Within a part the
softmax runs online from zero, block after block; parts are then merged in their order. Both are the same whether a
program walks all parts of many tokens (prompts) or of one, or each part of one token has a program of its own, the last
of which to end merges them (decoding): a token has the same bits in any step. A block or part that a token does not see
changes nothing, exactly, and so may be left out.

Sums go through the matrix units, those of the softmax's weights too: their order is that of 16 keys after 16, whatever
the tile. The weights are rounded to BF16 before either sum.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl

from ....quant.gpu.early import await_inputs

BLOCK = tl.constexpr(64)  # keys of a step
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _finite(peak):
    """What is subtracted: 0 where nothing was seen yet."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _each_row(x, TURNED: tl.constexpr):
    """A value of each row of q, [M], beside what rows have many of: [M, 1], or [1, M] where those lie in columns."""
    return tl.expand_dims(x, 0 if TURNED else 1)


@triton.jit
def _merge(peak, mass, total, part_peak, part_mass, part_total, TURNED: tl.constexpr = False):
    """What was summed so far, and a part more: softmax peaks [M] (base 2), masses [M, any], weighted values [M, D]."""
    new = tl.maximum(peak, part_peak)
    old = _each_row(tl.exp2(peak - _finite(new)), TURNED)
    weight = _each_row(tl.exp2(part_peak - _finite(new)), TURNED)
    mass = tl.fma(part_mass, tl.broadcast_to(weight, mass.shape), mass * old)
    total = tl.fma(part_total, tl.broadcast_to(weight, total.shape), total * old)
    return new, mass, total


@triton.jit
def _normalized(total, mass, TURNED: tl.constexpr = False):
    """BF16, as total lies: total [M, D] over mass [M, any], the same in every column; 0 where nothing was seen."""
    mass = tl.max(mass, axis=0 if TURNED else 1)
    mass = tl.where(mass == 0.0, 1.0, mass)
    return tl.div_rn(total, tl.broadcast_to(_each_row(mass, TURNED), total.shape)).to(tl.bfloat16)


@triton.jit
def _capped(scores, softcap):
    """softcap * tanh(scores / softcap), in base 2."""
    folded = tl.exp2(tl.abs(scores) * (-2 * LOG2E / softcap))
    capped = tl.div_rn(1.0 - folded, 1.0 + folded) * (softcap * LOG2E)
    return tl.where(scores < 0, -capped, capped)


@triton.jit
def _scores(q, k, key, position, scale, softcap, window, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr):
    """[M, BLOCK] in base 2, -inf where a token does not see a key. `scale` holds log2(e), but for softcapped scores."""
    scores = tl.dot(q, k) * scale
    if SOFTCAP:
        scores = _capped(scores, softcap)
    seen = key[None, :] <= position[:, None]
    if WINDOW:
        seen = seen & (key[None, :] > position[:, None] - window)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _load_keys(ptr, pages_ptr, key, col, stride, D: tl.constexpr, COLS: tl.constexpr, PAGE: tl.constexpr):
    """Rows of the cache [BLOCK, COLS] of a sequence's keys, BF16; what E4M3 codes stand for at scale 1."""
    page = tl.load(pages_ptr + key // PAGE).to(tl.int64)
    at = (page * PAGE + key % PAGE)[:, None] * stride + col[None, :]
    if D == COLS:
        return tl.load(ptr + at).to(tl.bfloat16)
    return tl.load(ptr + at, mask=(col < D)[None, :], other=0.0).to(tl.bfloat16)


@triton.jit
def _step(
    q, k, v, key, position, peak, mass, total, scale, softcap, window, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr
):
    """A block of keys [COLS, BLOCK] and values [BLOCK, COLS] more; masses [M, 16] hold the same in every column."""
    scores = _scores(q, k, key, position, scale, softcap, window, WINDOW, SOFTCAP)
    new = tl.maximum(peak, tl.max(scores, axis=1))
    base = _finite(new)
    weights, kept = tl.exp2(scores - base[:, None]).to(tl.bfloat16), tl.exp2(peak - base)
    mass = tl.dot(weights, tl.full((BLOCK, 16), 1.0, tl.float32).to(tl.bfloat16), mass * kept[:, None])
    return new, mass, tl.dot(weights, v, total * kept[:, None])


@triton.jit
def _turned_step(
    q, k, v, key, length, peak, mass, total, scale, softcap, window, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr
):
    """The same for one token, its heads in columns: q [COLS, M], keys and values [BLOCK, COLS], masses [16, M], total
    [COLS, M]. The matrix units take few columns, but no fewer than 16 rows."""
    scores = tl.dot(k, q) * scale
    if SOFTCAP:
        scores = _capped(scores, softcap)
    seen = key < length
    if WINDOW:
        seen = seen & (key >= length - window)
    scores = tl.where(seen[:, None], scores, float("-inf"))
    new = tl.maximum(peak, tl.max(scores, axis=0))
    base = _finite(new)
    weights, kept = tl.exp2(scores - base[None, :]).to(tl.bfloat16), tl.exp2(peak - base)
    ones = tl.full((16, BLOCK), 1.0, tl.float32).to(tl.bfloat16)
    mass = tl.dot(ones, weights, mass * kept[None, :])
    return new, mass, tl.dot(tl.trans(v), weights, total * kept[None, :])


@triton.jit(do_not_specialize=["window"])
def prompt_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    tiles_ptr,
    first_page_ptr,
    pages_ptr,
    scale,
    softcap,
    stride,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    M: tl.constexpr,
    PART: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A tile of one sequence's tokens, all heads of a group: q, out [num_tokens, HEADS, D].

    tiles int32 [num_tiles, 4]: sequence, first row of q, its position, how many tokens (M // GROUP at the most).
    """
    await_inputs(EARLY)
    tiles_ptr += tl.program_id(1) * 4
    sequence, first_row = tl.load(tiles_ptr), tl.load(tiles_ptr + 1)
    first, count = tl.load(tiles_ptr + 2), tl.load(tiles_ptr + 3)
    kv_head = tl.program_id(0)
    pages_ptr += tl.load(first_page_ptr + sequence)
    keys_ptr += kv_head * D
    values_ptr += kv_head * D
    row, col = tl.arange(0, M), tl.arange(0, COLS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    exists = (token < count)[:, None] & (col < D)[None, :]
    at = ((first_row + token).to(tl.int64) * HEADS + head)[:, None] * D + col[None, :]
    q = tl.load(q_ptr + at, mask=exists, other=0.0)
    position = first + tl.minimum(token, count - 1)
    end = first + count  # of the keys that some token sees
    start = 0
    if WINDOW:
        start = tl.maximum(first - window + 1, 0) // PART * PART
    peak, mass = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M, 16), tl.float32)
    total = tl.zeros((M, COLS), tl.float32)
    part_peak, part_mass, part_total = peak, mass, total
    for step in tl.range(start, end, BLOCK, num_stages=STAGES):
        key = step + tl.arange(0, BLOCK)
        inside = tl.minimum(key, end - 1)  # beyond, a key that is there is read and not seen
        k = _load_keys(keys_ptr, pages_ptr, inside, col, stride, D, COLS, PAGE)
        v = _load_keys(values_ptr, pages_ptr, inside, col, stride, D, COLS, PAGE)
        part_peak, part_mass, part_total = _step(
            q, tl.trans(k), v, key, position, part_peak, part_mass, part_total, scale, softcap, window, WINDOW, SOFTCAP
        )
        if (step + BLOCK) % PART == 0:
            peak, mass, total = _merge(peak, mass, total, part_peak, part_mass, part_total)
            part_peak = tl.full((M,), float("-inf"), tl.float32)
            part_mass, part_total = tl.zeros((M, 16), tl.float32), tl.zeros((M, COLS), tl.float32)
    peak, mass, total = _merge(peak, mass, total, part_peak, part_mass, part_total)  # an empty part changes nothing
    tl.store(out_ptr + at, _normalized(total, mass), mask=exists)


@triton.jit
def _load_sums(peaks_ptr, masses_ptr, totals_ptr, cell, real, col, D: tl.constexpr):
    """A part's peaks [M], masses [1, M] and totals [COLS, M]; out of the L2, where other programs wrote them."""
    peak = tl.load(peaks_ptr + cell, mask=real, other=0.0, cache_modifier=".cg")
    mass = tl.load(masses_ptr + cell, mask=real, other=0.0, cache_modifier=".cg")[None, :]
    exists = real[None, :] & (col < D)[:, None]
    total = tl.load(totals_ptr + cell[None, :] * D + col[:, None], mask=exists, other=0.0, cache_modifier=".cg")
    return peak, mass, total


@triton.jit(do_not_specialize=["num_sequences", "window"])
def token_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    peaks_ptr,
    masses_ptr,
    totals_ptr,
    ended_ptr,
    items_ptr,
    sequences_ptr,
    first_item_ptr,
    pages_ptr,
    num_sequences,
    scale,
    softcap,
    stride,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    M: tl.constexpr,
    PART: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token of each sequence: q, out [num_tokens, HEADS, D].

    items int32 [num_items, 3]: sequence, first part and end; sequences int32 [num_sequences, 3]: row of q, how many
    keys, where its pages begin; first_item int32 [num_sequences + 1]. Programs take items in turns. Where a sequence
    has several items, what they sum goes to peaks and masses float32 [num_items, HEADS] and totals float32
    [num_items, HEADS, D]; `ended` int32 [num_items, kv_heads], zeros before and after, counts them.
    """
    await_inputs(EARLY)
    kv_head = tl.program_id(0)
    keys_ptr += kv_head * D
    values_ptr += kv_head * D
    row, col = tl.arange(0, M), tl.arange(0, COLS)
    head = kv_head * GROUP + row
    real = row < GROUP
    exists = real[None, :] & (col < D)[:, None]
    for item in range(tl.program_id(1), tl.load(first_item_ptr + num_sequences), tl.num_programs(1)):
        sequence = tl.load(items_ptr + 3 * item)
        first_part, end_part = tl.load(items_ptr + 3 * item + 1), tl.load(items_ptr + 3 * item + 2)
        own_ptr = sequences_ptr + 3 * sequence
        length, own_pages = tl.load(own_ptr + 1), pages_ptr + tl.load(own_ptr + 2)
        first_item, end_item = tl.load(first_item_ptr + sequence), tl.load(first_item_ptr + sequence + 1)
        at = (tl.load(own_ptr).to(tl.int64) * HEADS + head)[None, :] * D + col[:, None]
        q = tl.load(q_ptr + at, mask=exists, other=0.0)
        peak, mass = tl.full((M,), float("-inf"), tl.float32), tl.zeros((16, M), tl.float32)
        total = tl.zeros((COLS, M), tl.float32)
        for part in range(first_part, end_part):
            start, end = part * PART, tl.minimum(length, (part + 1) * PART)
            if WINDOW:
                start = tl.maximum(start, tl.maximum(length - window, 0) // BLOCK * BLOCK)
            part_peak, part_mass = tl.full((M,), float("-inf"), tl.float32), tl.zeros((16, M), tl.float32)
            part_total = tl.zeros((COLS, M), tl.float32)
            for step in tl.range(start, end, BLOCK, num_stages=STAGES):
                key = step + tl.arange(0, BLOCK)
                inside = tl.minimum(key, length - 1)  # beyond, a key that is there is read and not seen
                k = _load_keys(keys_ptr, own_pages, inside, col, stride, D, COLS, PAGE)
                v = _load_keys(values_ptr, own_pages, inside, col, stride, D, COLS, PAGE)
                part_peak, part_mass, part_total = _turned_step(
                    q, k, v, key, length, part_peak, part_mass, part_total, scale, softcap, window,
                    WINDOW, SOFTCAP,
                )  # fmt: skip
            peak, mass, total = _merge(peak, mass, total, part_peak, part_mass, part_total, True)
        if end_item - first_item == 1:
            tl.store(out_ptr + at, _normalized(total, mass, True), mask=exists)
        else:
            cell = item * HEADS + head.to(tl.int64)
            tl.store(peaks_ptr + cell, peak, mask=real)
            tl.store(masses_ptr + cell, tl.max(mass, axis=0), mask=real)
            tl.store(totals_ptr + cell[None, :] * D + col[:, None], total, mask=exists)
            tl.debug_barrier()  # all threads have stored before one of them says so
            counter = ended_ptr + first_item * tl.num_programs(0) + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == end_item - first_item - 1:
                tl.store(counter, 0)
                peak, all_mass = tl.full((M,), float("-inf"), tl.float32), tl.zeros((1, M), tl.float32)
                total = tl.zeros((COLS, M), tl.float32)
                for other in range(first_item, end_item):
                    cell = other * HEADS + head.to(tl.int64)
                    sums = _load_sums(peaks_ptr, masses_ptr, totals_ptr, cell, real, col, D)
                    peak, all_mass, total = _merge(peak, all_mass, total, sums[0], sums[1], sums[2], True)
                tl.store(out_ptr + at, _normalized(total, all_mass, True), mask=exists)
