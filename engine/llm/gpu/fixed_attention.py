"""`FixedAttention`: paged attention whose bits do not depend on the step that a token is computed in."""

# pyright: reportCallIssue=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from collections.abc import Sequence

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
from ..paged_attention import Span
from ..transfers import upload
from .flashinfer_attention import slots_of
from .paged_kernels import LOG2E, merge_kernel, prompt_kernel, token_kernel

Numbers = NDArray[np.int32]


class Shape(Struct, frozen=True):
    """`part`: keys of a part, the order of sums and so the same for all; the rest changes no bit.

    Rows are tokens times heads of a group.
    """

    part: int = 256
    prompt_rows: int = 128
    prompt_warps: int = 8
    prompt_stages: int = 3
    token_rows: int = 16
    token_warps: int = 2
    token_stages: int = 5
    programs: int = 1056  # of single tokens, at the most
    items: int = 4096  # whose sums are kept; sequences are not cut into parts where there would be more


SHAPE = Shape()
HEAD_DIMS = (64, 128, 256)


class Tokens(Struct, frozen=True):
    """Single tokens of some sequences, int32 on the device."""

    sequences: Tensor  # [num_sequences, 3]: row of q, how many keys, where its pages begin
    first_item: Tensor  # [num_sequences + 1]
    items: Tensor  # [num_items, 3]: sequence, first part, end
    pages: Tensor


class Prompts(Struct, frozen=True):
    """Tiles of sequences' tokens, int32 on the device."""

    tiles: Tensor  # [num_tiles, 4]: sequence, first row of q, its position, how many tokens
    first_page: Tensor  # [num_sequences]
    pages: Tensor


def token_tables(spans: Sequence[Span], rows: Sequence[int], shape: Shape = SHAPE) -> tuple[Numbers, ...]:
    """What `Tokens` holds, of spans of one token each, which lie in these rows of q."""
    lengths = np.array([span.end for span in spans], dtype=np.int32)
    counts = -(-lengths // PAGE_SIZE)
    parts = -(-lengths // shape.part)
    whole = parts.sum() > shape.items
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
    tokens = shape.prompt_rows // group
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
        M=shape.prompt_rows, STAGES=shape.prompt_stages, num_warps=shape.prompt_warps,
        **_options(spec, q.shape[1], shape), **early(q),
    )  # fmt: skip


@on_own_device
def attend_tokens(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    tokens: Tokens,
    scratch: tuple[Tensor, Tensor, Tensor],
    spec: AttentionSpec,
    shape: Shape = SHAPE,
) -> None:
    """The same of single tokens; `scratch`: peaks, masses and totals of as many items as there can be."""
    options, num_sequences, num_heads = _options(spec, q.shape[1], shape), len(tokens.sequences), q.shape[1]
    programs = min(len(tokens.items), max(1, shape.programs // spec.num_kv_heads))
    token_kernel[(spec.num_kv_heads, programs)](
        q, keys, values, out, *scratch, tokens.items, tokens.sequences, tokens.first_item, tokens.pages, num_sequences,
        *_numbers(spec, keys.stride(0)),
        M=max(shape.token_rows, 1 << (num_heads // spec.num_kv_heads - 1).bit_length()),
        STAGES=shape.token_stages, num_warps=shape.token_warps, **options, **early(q),
    )  # fmt: skip
    merge_kernel[(num_sequences, num_heads)](
        *scratch, out, tokens.sequences, tokens.first_item,
        HEADS=num_heads, D=options["D"], COLS=options["COLS"], STAGES=4, num_warps=1, **early(q),
    )  # fmt: skip


class FixedAttention:
    """Attention of one engine, in place of `FlashInferAttention`."""

    def __init__(self, cache: KVCache, specs: Sequence[AttentionSpec], num_heads: int) -> None:
        self.cache, self.num_heads, self.device = cache, num_heads, cache.keys.device
        self.group, self.head_dim = num_heads // specs[0].num_kv_heads, specs[0].key_dim
        self._scratch = torch.empty(0, device=self.device)

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

    def scratch(self, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
        """Peaks and masses float32 [num_items * heads], totals [num_items * heads * head_dim]."""
        rows = num_items * self.num_heads
        sizes = (rows, rows, rows * self.head_dim)
        return tuple(torch.empty(sum(sizes), dtype=torch.float32, device=self.device).split(sizes))  # pyright: ignore


class FixedStep(CachedAttend):
    """Prompts' tokens in tiles, single tokens in parts."""

    def __init__(self, owner: FixedAttention, spans: Sequence[Span]) -> None:
        self.cache, device = owner.cache, owner.device
        self.slots = upload(slots_of(spans), device)
        rows = np.cumsum([0, *(span.end - span.start for span in spans)]).tolist()
        single = [span.end - span.start == 1 for span in spans]
        self.tokens = self.prompts = self.scratch = None
        if any(single):
            own = [index for index, one in enumerate(single) if one]
            tables = token_tables([spans[i] for i in own], [rows[i] for i in own])
            self.tokens = Tokens(*(_upload(table, device) for table in tables))
            self.scratch = owner.scratch(len(self.tokens.items))
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
            assert self.scratch is not None
            attend_tokens(q, keys, values, out, self.tokens, self.scratch, spec)
        return out


class FixedDecode(FixedStep):
    """Single tokens at fixed addresses: `plan` writes a step's tables into the buffers that a captured graph reads."""

    def __init__(self, owner: FixedAttention, batch_size: int, max_pages: int) -> None:
        self.cache, self.batch_size, self.prompts, device = owner.cache, batch_size, None, owner.device
        num_items = max(batch_size, min(SHAPE.items, -(-max_pages * PAGE_SIZE // SHAPE.part)))
        sizes = (3 * batch_size, batch_size + 1, 3 * num_items, max_pages)
        self._parts = torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)
        sequences, first_item, items, pages = self._parts
        self.tokens = Tokens(sequences.view(-1, 3), first_item, items.view(-1, 3), pages)
        self.scratch = owner.scratch(num_items)
        self.slots = torch.zeros(batch_size, dtype=torch.long, device=device)

    def plan(self, spans: Sequence[Span]) -> None:
        """Spans of one token each; where there are fewer than `batch_size`, the rest reads and writes page 0."""
        spans = [*spans, *[Span([0], 0, 1)] * (self.batch_size - len(spans))]
        for part, table in zip(self._parts, token_tables(spans, range(len(spans))), strict=True):
            part[: table.size].copy_(_pinned(table.ravel(), part.device), non_blocking=True)
        self.slots.copy_(upload(slots_of(spans), self.slots.device))


def _upload(table: Numbers, device: torch.device) -> Tensor:
    return _pinned(table, device).to(device, non_blocking=True)


def _pinned(table: Numbers, device: torch.device) -> Tensor:
    host = torch.from_numpy(table)
    return host if device.type == "cpu" else host.pin_memory()
