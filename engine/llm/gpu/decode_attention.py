"""Attention of decoding tokens over the paged KV cache, in one launch.

A sequence is cut into splits (`decode_table.py`), each of which a program attends to by online softmax; who ends last
of a sequence's splits adds them up, in their order. What a row gets depends on its own sequence alone: not on its
company, nor on which program came when.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# (to a type checker a kernel is the function that Triton compiles)

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....quant import Capability
from ....quant.gpu.device import on_own_device
from ....quant.gpu.early import await_inputs, early
from ..attention import AttentionSpec
from ..cached_attend import CachedAttend
from ..kv_cache import KVCache
from ..page_pool import PAGE_SIZE
from ..paged_attention import Span, slots_of
from ..transfers import upload
from .decode_table import BLOCK, MOST_SPLITS, DecodeTable

LOG2_E = log2(e)
PROGRAMS = 4  # of a multiprocessor
WARPS, STAGES = 4, 3


@triton.jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores [heads, tokens] times log2(e), which `scale` holds already where there is no softcap."""
    scores = tl.dot(q, tl.trans(k.to(tl.bfloat16))) * scale
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * 1.4426950408889634 / softcap)))
        scores = softcap * tanh * 1.4426950408889634
    return scores


@triton.jit
def _attend(
    q,
    keys_ptr,
    values_ptr,
    pages_ptr,
    begin,
    start,
    stop,
    scale,
    softcap,
    key_stride,
    value_stride,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Online softmax of q [ROWS, HEAD_DIM] over the tokens [start, stop) from `begin` on: (peak, sum, weighted v)."""
    col = tl.arange(0, HEAD_DIM)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for at in range(start, stop, BLOCK):
        token = at + tl.arange(0, BLOCK)
        exists = (token >= begin) & (token < stop)
        page = tl.load(pages_ptr + token // PAGE, mask=exists, other=0)
        slot = page.to(tl.int64) * PAGE + token % PAGE
        k = tl.load(keys_ptr + slot[:, None] * key_stride + col[None, :], mask=exists[:, None], other=0.0)
        v = tl.load(values_ptr + slot[:, None] * value_stride + col[None, :], mask=exists[:, None], other=0.0)
        scores = tl.where(exists[None, :], _scores(q, k, scale, softcap, SOFTCAP), float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(tl.bfloat16), v.to(tl.bfloat16), out * shrink[:, None])
        peak = higher
    return peak, total, out


@triton.jit
def _sum_splits(
    parts_ptr, sums_ptr, first, splits, row, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """All splits of a sequence and KV head, in order: attention [ROWS, HEAD_DIM]."""
    col = tl.arange(0, HEAD_DIM)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for split in range(splits):
        at = (first + split) * GROUP + row
        part_peak = tl.load(sums_ptr + at * 2, mask=row < GROUP, other=0.0, cache_modifier=".cg")
        part_total = tl.load(sums_ptr + at * 2 + 1, mask=row < GROUP, other=0.0, cache_modifier=".cg")
        offset = at[:, None] * HEAD_DIM + col[None, :]
        part = tl.load(parts_ptr + offset, mask=(row < GROUP)[:, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, part_peak)
        shrink, part_shrink = tl.exp2(peak - higher), tl.exp2(part_peak - higher)
        total = total * shrink + part_total * part_shrink
        out = out * shrink[:, None] + part * part_shrink[:, None]
        peak = higher
    return out / total[:, None]


@triton.jit
def _decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    count_ptr,
    rows_ptr,
    items_ptr,
    pages_ptr,
    parts_ptr,
    sums_ptr,
    done_ptr,
    out_ptr,
    scale,
    softcap,
    key_stride,
    value_stride,
    max_items,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs of one KV head share the splits of all sequences among them."""
    head = tl.program_id(0)
    row, col = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    keys_ptr += head * HEAD_DIM
    values_ptr += head * HEAD_DIM
    num_items = tl.load(count_ptr)
    await_inputs(EARLY)
    for item in range(tl.program_id(1), num_items, tl.num_programs(1)):
        token = tl.load(items_ptr + item * 4).to(tl.int64)
        start = tl.load(items_ptr + item * 4 + 1)
        stop = tl.load(items_ptr + item * 4 + 2)
        first_page = tl.load(rows_ptr + token * 4)
        begin = tl.load(rows_ptr + token * 4 + 1)
        first = tl.load(rows_ptr + token * 4 + 2)
        splits = tl.load(rows_ptr + token * 4 + 3)
        mine = ((token * KV_HEADS + head) * GROUP + row)[:, None] * HEAD_DIM + col[None, :]
        exists = (row < GROUP)[:, None]
        q = tl.load(q_ptr + mine, mask=exists, other=0.0)
        peak, total, out = _attend(
            q, keys_ptr, values_ptr, pages_ptr + first_page, begin, start, stop, scale, softcap, key_stride,
            value_stride, HEAD_DIM, ROWS, BLOCK, PAGE, SOFTCAP,
        )  # fmt: skip
        if splits == 1:
            tl.store(out_ptr + mine, (out / total[:, None]).to(tl.bfloat16), mask=exists)
        else:
            base = head.to(tl.int64) * max_items
            at = (base + item) * GROUP + row
            tl.store(sums_ptr + at * 2, peak, mask=row < GROUP)
            tl.store(sums_ptr + at * 2 + 1, total, mask=row < GROUP)
            tl.store(parts_ptr + at[:, None] * HEAD_DIM + col[None, :], out, mask=exists)
            tl.debug_barrier()  # every thread's part is there before one of them says so
            done = tl.atomic_add(done_ptr + token * KV_HEADS + head, 1, sem="acq_rel")
            if done == splits - 1:
                whole = _sum_splits(parts_ptr, sums_ptr, base + first, splits, row, GROUP, ROWS, HEAD_DIM)
                tl.store(out_ptr + mine, whole.to(tl.bfloat16), mask=exists)
                tl.store(done_ptr + token * KV_HEADS + head, 0)


class SplitResults:
    """Where the splits of a kernel at work lie, for the largest batch: `parts` and `sums` float32, weighted values and
    (largest score, sum of exponentials); `done` int32, how many splits of each sequence and KV head have ended."""

    def __init__(self, batch_size: int, num_heads: int, spec: AttentionSpec, device: torch.device) -> None:
        results = batch_size * MOST_SPLITS * num_heads
        self.parts = torch.empty(results * spec.value_dim, dtype=torch.float32, device=device)
        self.sums = torch.empty(results * 2, dtype=torch.float32, device=device)
        self.done = torch.zeros(batch_size * spec.num_kv_heads, dtype=torch.int32, device=device)


@on_own_device
def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: DecodeTable, results: SplitResults, spec: AttentionSpec
) -> Tensor:
    """BF16 q [num_sequences, num_heads, head_dim] -> the same: each row attends to its sequence, itself included.

    keys, values: BF16 or E4M3 [num_slots, kv_heads, head_dim], a token's heads side by side. `table` says where each
    sequence lies; its window is the layer's.
    """
    num_rows, num_heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    assert num_rows == table.batch_size
    assert table.window == spec.window
    group = num_heads // kv_heads
    out = torch.empty_like(q)
    _decode_kernel[(kv_heads, _programs(table, kv_heads))](
        q, keys, values, table.count, table.rows, table.items, table.pages,
        results.parts, results.sums, results.done, out,
        spec.scale * (LOG2_E if spec.softcap is None else 1.0), spec.softcap or 0.0,
        keys.stride(0), values.stride(0), table.max_items,
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim,
        BLOCK=BLOCK, PAGE=PAGE_SIZE, SOFTCAP=spec.softcap is not None,
        num_warps=WARPS, num_stages=STAGES, **early(q),
    )  # fmt: skip
    return out


def _programs(table: DecodeTable, kv_heads: int) -> int:
    """How many share the splits of one KV head."""
    at_once = PROGRAMS * multiprocessors(table.count.device)
    return min(table.max_items, -(-at_once // kv_heads))


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class SplitDecoding:
    """Decoding attention of one engine: makes what a CUDA graph of a batch size reads."""

    def __init__(self, kv_cache: KVCache, specs: Sequence[AttentionSpec], num_heads: int, max_batch_size: int) -> None:
        self.cache, self.windows = kv_cache, {spec.window for spec in specs}
        self.results = SplitResults(max_batch_size, num_heads, specs[0], kv_cache.keys.device)

    @staticmethod
    def unsupported(capability: Capability) -> str | None:
        """Why this kernel is not for that device, or None."""
        return None if capability.sm == 90 else f"its tiles were measured on sm90, this is {capability}"

    def decode_step(self, batch_size: int, max_pages: int) -> SplitDecodeStep:
        """Attention for a CUDA graph: one new token of each of `batch_size` sequences, of `max_pages` pages in all."""
        return SplitDecodeStep(self, batch_size, max_pages)


class SplitDecodeStep(CachedAttend):
    """One batch size: `plan` writes a step's tables into the buffers that a captured graph reads."""

    def __init__(self, owner: SplitDecoding, batch_size: int, max_pages: int) -> None:
        self.cache, self.results, self.batch_size = owner.cache, owner.results, batch_size
        device = self.cache.keys.device
        self.tables = {window: DecodeTable(batch_size, max_pages, window, device) for window in owner.windows}
        self.slots = torch.zeros(batch_size, dtype=torch.long, device=device)

    def plan(self, spans: Sequence[Span]) -> None:
        """Spans of one token each; where there are fewer than `batch_size`, the rest reads and writes page 0."""
        spans = [*spans, *[Span([0], 0, 1)] * (self.batch_size - len(spans))]
        for table in self.tables.values():
            table.plan(spans)
        self.slots.copy_(upload(slots_of(spans), self.slots.device))

    def read(self, spec: AttentionSpec, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        assert sinks is None
        keys, values = self.cache.keys[spec.layer], self.cache.values[spec.layer]
        return decode_attention(q.contiguous(), keys, values, self.tables[spec.window], self.results, spec)
