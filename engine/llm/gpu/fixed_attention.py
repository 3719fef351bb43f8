"""`FixedAttention`: paged attention whose bits do not depend on the step that a token is computed in."""

# pyright: reportCallIssue=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from ....quant import Capability
from ....quant.gpu.device import on_own_device
from ....quant.gpu.early import early
from ..attention import AttentionSpec
from ..cached_attend import CachedAttend
from ..kv_cache import KVCache
from ..page_pool import PAGE_SIZE
from ..paged_attention import Span, slots_of
from ..transfers import upload
from .paged_kernels import LOG2E, prompt_kernel, token_kernel

Numbers = NDArray[np.int32]


class Shape(Struct, frozen=True):
    """`part`: keys of a part, the order of sums and so the same for all; the rest changes no bit.

    Rows are tokens times heads of a group; warps are those of heads up to 128, larger ones take more.
    """

    part: int = 256
    prompt_rows: int = 64
    prompt_warps: int = 4
    prompt_stages: int = 3
    part_warps: int = 4  # where sequences are cut into parts
    part_stages: int = 2
    whole_warps: int = 2  # where they are as many as fill the GPU
    whole_stages: int = 3
    programs: int = 1024  # of single tokens, at the most
    items: int = 2048  # whose sums are kept; sequences are not cut into parts where there would be more
    enough: int = 512  # programs: sequences are not cut where they are as many without

    def warps(self, kind: Literal["prompt", "part", "whole"], head_dim: int) -> int:
        return getattr(self, f"{kind}_warps") * max(1, head_dim // 128)


SHAPE = Shape()
HEAD_DIMS = (64, 128, 256)


class Tokens(Struct, frozen=True):
    """Single tokens of some sequences, int32 on the device."""

    sequences: Tensor  # [num_sequences, 3]: row of q, how many keys, where its pages begin
    first_item: Tensor  # [num_sequences + 1]
    items: Tensor  # [num_items, 3]: sequence, first part, end
    pages: Tensor


class Scratch:
    """What the parts of sequences sum while a kernel runs: float32 `peaks` and `masses` [items, heads], `totals`
    [items, heads, head_dim]; `ended` int32 [items, kv_heads], which it leaves as zeros."""

    def __init__(self, items: int, num_heads: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.peaks, self.masses = torch.empty(2, items, num_heads, dtype=torch.float32, device=device)
        self.totals = torch.empty(items, num_heads, head_dim, dtype=torch.float32, device=device)
        self.ended = torch.zeros(items, kv_heads, dtype=torch.int32, device=device)


class Prompts(Struct, frozen=True):
    """Tiles of sequences' tokens, int32 on the device."""

    tiles: Tensor  # [num_tiles, 4]: sequence, first row of q, its position, how many tokens
    first_page: Tensor  # [num_sequences]
    pages: Tensor


def token_tables(
    spans: Sequence[Span], rows: Sequence[int], kv_heads: int, shape: Shape = SHAPE
) -> tuple[Numbers, ...]:
    """What `Tokens` holds, of spans of one token each, which lie in these rows of q."""
    lengths = np.array([span.end for span in spans], dtype=np.int32)
    counts = -(-lengths // PAGE_SIZE)
    parts = -(-lengths // shape.part)
    whole = parts.sum() > shape.items or len(spans) * kv_heads >= shape.enough
    num_items = np.ones_like(parts) if whole else parts
    first_item = np.cumsum([0, *num_items], dtype=np.int32)
    owner = np.repeat(np.arange(len(spans), dtype=np.int32), num_items)
    part = np.arange(len(owner), dtype=np.int32) - first_item[owner]
    items = np.stack([owner, part, parts[owner] if whole else part + 1], axis=1)
    first_page = np.cumsum([0, *counts[:-1]], dtype=np.int32)
    sequences = np.stack([np.array(rows, dtype=np.int32), lengths, first_page], axis=1)
    return sequences, first_item, items.astype(np.int32), _pages_of(spans, counts)


def prompt_tables(spans: Sequence[Span], rows: Sequence[int], group: int, shape: Shape = SHAPE) -> tuple[Numbers, ...]:
    """What `Prompts` holds, of spans whose first tokens lie in these rows of q; the last tokens of each come first,
    which see the most keys."""
    tokens = max(1, shape.prompt_rows // group)
    tiles = [
        (index, row + at, span.start + at, min(tokens, span.end - span.start - at))
        for index, (span, row) in enumerate(zip(spans, rows, strict=True))
        for at in range(0, span.end - span.start, tokens)
    ]
    tiles.sort(key=lambda tile: -tile[2])
    counts = np.array([-(-span.end // PAGE_SIZE) for span in spans], dtype=np.int32)
    first_page = np.cumsum([0, *counts[:-1]], dtype=np.int32)
    return np.array(tiles, dtype=np.int32), first_page, _pages_of(spans, counts)


def _pages_of(spans: Sequence[Span], counts: Numbers) -> Numbers:
    return np.concatenate(
        [np.asarray(span.pages[:count], dtype=np.int32) for span, count in zip(spans, counts, strict=True)]
    )


def _options(spec: AttentionSpec, num_heads: int, shape: Shape) -> dict[str, int | bool]:
    return {
        "HEADS": num_heads,
        "GROUP": num_heads // spec.num_kv_heads,
        "D": spec.key_dim,
        "COLS": 1 << (spec.key_dim - 1).bit_length(),
        "PART": shape.part,
        "PAGE": PAGE_SIZE,
        "WINDOW": spec.window is not None,
        "SOFTCAP": spec.softcap is not None,
    }


def _rows_of(q: Tensor, spec: AttentionSpec) -> int:
    """The power of two that a token's heads of a group fit into."""
    return 1 << (q.shape[1] // spec.num_kv_heads - 1).bit_length()


def _numbers(spec: AttentionSpec, stride: int) -> tuple[float, float, int, int]:
    """Scale, softcap, stride of the cache and window, as kernels take them."""
    scale = spec.scale if spec.softcap is not None else spec.scale * LOG2E.value
    return scale, spec.softcap or 1.0, stride, spec.window or 0


@on_own_device
def attend_prompts(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, prompts: Prompts, spec: AttentionSpec, shape: Shape = SHAPE
) -> None:
    """BF16 q, out [num_tokens, heads, head_dim]; keys, values BF16 or E4M3 [num_slots, kv_heads, head_dim]."""
    prompt_kernel[(spec.num_kv_heads, len(prompts.tiles))](
        q, keys, values, out, prompts.tiles, prompts.first_page, prompts.pages,
        *_numbers(spec, keys.stride(0)),
        M=max(shape.prompt_rows, _rows_of(q, spec)), STAGES=shape.prompt_stages,
        num_warps=shape.warps("prompt", q.shape[2]),
        **_options(spec, q.shape[1], shape), **early(q),
    )  # fmt: skip


@on_own_device
def attend_tokens(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    tokens: Tokens,
    scratch: Scratch,
    spec: AttentionSpec,
    shape: Shape = SHAPE,
) -> None:
    """The same of single tokens; `scratch` has room for as many items as there can be."""
    options, num_sequences = _options(spec, q.shape[1], shape), len(tokens.sequences)
    whole = num_sequences * spec.num_kv_heads >= shape.enough
    programs = min(len(tokens.items), max(1, shape.programs // spec.num_kv_heads))
    token_kernel[(spec.num_kv_heads, programs)](
        q, keys, values, out, scratch.peaks, scratch.masses, scratch.totals, scratch.ended,
        tokens.items, tokens.sequences, tokens.first_item, tokens.pages, num_sequences,
        *_numbers(spec, keys.stride(0)),
        M=max(8, _rows_of(q, spec)),
        STAGES=shape.whole_stages if whole else shape.part_stages,
        num_warps=shape.warps("whole" if whole else "part", q.shape[2]), **options, **early(q),
    )  # fmt: skip


class FixedAttention:
    """Attention of one engine, in place of `FlashInferAttention`."""

    def __init__(self, cache: KVCache, specs: Sequence[AttentionSpec], num_heads: int) -> None:
        self.cache, self.num_heads, self.device = cache, num_heads, cache.keys.device
        self.kv_heads = specs[0].num_kv_heads
        self.group = num_heads // self.kv_heads
        self.scratch = Scratch(SHAPE.items, num_heads, self.kv_heads, specs[0].key_dim, self.device)

    @staticmethod
    def unsupported(specs: Sequence[AttentionSpec], capability: Capability, dtype: torch.dtype) -> str | None:
        """Why it cannot attend here, or None."""
        if capability.sm is None or capability.sm < 80:
            return f"runs on sm80 and later, this is {capability}"
        if "triton" not in capability.libraries:
            return "triton is not installed"
        if dtype != torch.bfloat16:
            return f"computes in bfloat16, not {dtype}"
        for spec in specs:
            if spec.key_dim != spec.value_dim or spec.key_dim not in HEAD_DIMS:
                return f"has heads of {HEAD_DIMS}, not keys of {spec.key_dim} and values of {spec.value_dim}"
            if spec.sinks:
                return "has no sinks"
        return None

    def step(self, spans: Sequence[Span]) -> FixedStep:
        """Attention for any step: each span's tokens see their sequence up to themselves."""
        return FixedStep(self, spans)

    def decode_step(self, batch_size: int, max_pages: int) -> FixedDecode:
        """Attention for a CUDA graph: one new token of each of `batch_size` sequences, of `max_pages` pages in all."""
        return FixedDecode(self, batch_size, max_pages)


class FixedStep(CachedAttend):
    """Prompts' tokens in tiles, single tokens in parts."""

    def __init__(self, owner: FixedAttention, spans: Sequence[Span]) -> None:
        self.cache, self.scratch, device = owner.cache, owner.scratch, owner.device
        self.slots = upload(slots_of(spans), device)
        rows = np.cumsum([0, *(span.end - span.start for span in spans)]).tolist()
        single = [span.end - span.start == 1 for span in spans]
        self.tokens = self.prompts = None
        if any(single):
            own = [index for index, one in enumerate(single) if one]
            tables = token_tables([spans[i] for i in own], [rows[i] for i in own], owner.kv_heads)
            self.tokens = Tokens(*(_upload(table, device) for table in tables))
        if not all(single):
            own = [index for index, one in enumerate(single) if not one]
            tables = prompt_tables([spans[i] for i in own], [rows[i] for i in own], owner.group)
            self.prompts = Prompts(*(_upload(table, device) for table in tables))

    def read(self, spec: AttentionSpec, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        assert sinks is None
        q, keys, values = q.contiguous(), self.cache.keys[spec.layer], self.cache.values[spec.layer]
        out = torch.empty_like(q)
        if self.prompts is not None:
            attend_prompts(q, keys, values, out, self.prompts, spec)
        if self.tokens is not None:
            attend_tokens(q, keys, values, out, self.tokens, self.scratch, spec)
        return out


class FixedDecode(FixedStep):
    """Single tokens at fixed addresses: `plan` writes a step's tables into the buffers that a captured graph reads."""

    def __init__(self, owner: FixedAttention, batch_size: int, max_pages: int) -> None:
        self.cache, self.scratch, self.prompts, device = owner.cache, owner.scratch, None, owner.device
        self.batch_size, self.kv_heads = batch_size, owner.kv_heads
        parts = batch_size + max_pages * PAGE_SIZE // SHAPE.part  # of all sequences: each one's last may be short
        num_items = max(batch_size, min(SHAPE.items, parts))
        sizes = [-(-size // 4) * 4 for size in (3 * batch_size, batch_size + 1, 3 * num_items, max_pages)]
        self._all = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._parts = sequences, first_item, items, pages = self._all.split(sizes)
        self.tokens = Tokens(
            sequences[: 3 * batch_size].view(-1, 3), first_item, items[: 3 * num_items].view(-1, 3), pages
        )
        self.slots = torch.zeros(batch_size, dtype=torch.long, device=device)

    def plan(self, spans: Sequence[Span]) -> None:
        """Spans of one token each; where there are fewer than `batch_size`, the rest reads and writes page 0."""
        spans = [*spans, *[Span([0], 0, 1)] * (self.batch_size - len(spans))]
        tables = token_tables(spans, range(len(spans)), self.kv_heads)
        whole = np.zeros(sum(len(part) for part in self._parts[:-1]) + tables[-1].size, dtype=np.int32)
        at = np.cumsum([0, *(len(part) for part in self._parts[:-1])])
        for start, table, part in zip(at, tables, self._parts, strict=True):  # one copy of all, the pages at the end
            assert table.size <= len(part)
            whole[start : start + table.size] = table.ravel()
        self._all[: len(whole)].copy_(_pinned(whole, self._all.device), non_blocking=True)
        self.slots.copy_(upload(slots_of(spans), self.slots.device))


def _upload(table: Numbers, device: torch.device) -> Tensor:
    return _pinned(table, device).to(device, non_blocking=True)


def _pinned(table: Numbers, device: torch.device) -> Tensor:
    host = torch.from_numpy(table)
    return host if device.type == "cpu" else host.pin_memory()
