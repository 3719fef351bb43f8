"""`PagedAttention`: attention of one step's tokens against the paged KV cache, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from msgspec import Struct
from torch import Tensor

from .attention import AttentionSpec
from .cached_attend import CachedAttend
from .kv_cache import KVCache
from .page_pool import PAGE_SIZE


class Span(Struct, frozen=True):
    """Tokens [start, end) of one sequence are computed in this step; `pages` hold the sequence from its begin."""

    pages: Sequence[int]
    start: int
    end: int


class _Group(Struct, frozen=True):
    """Sequences with equally many new tokens that are attended together."""

    rows: Tensor | slice  # of the step's flat tokens, sequence by sequence
    table: Tensor  # [num_sequences * num_pages] page numbers, padded with page 0
    positions: Tensor  # [num_sequences, num_queries]
    length: int  # of the padded sequences

    @property
    def shape(self) -> torch.Size:
        return self.positions.shape


class PagedAttention(CachedAttend):
    """Writes the new keys and values of all spans, then attends each span to its own sequence.

    All spans are written before any is read, so a sequence may share pages that another fills in the same step.
    What a token gets does not depend on its company: padding adds masked columns only.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        device = cache.keys.device
        self.slots = torch.tensor(slots_of(spans), device=device)
        self.groups = _make_groups(spans, device)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def read(self, spec: AttentionSpec, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        keys, values = self.cache.keys[spec.layer], self.cache.values[spec.layer]
        if len(self.groups) == 1:
            return self._attend(0, spec, q, keys, values, sinks)
        out = q.new_empty(*q.shape[:2], spec.value_dim)
        for index, group in enumerate(self.groups):
            out[group.rows] = self._attend(index, spec, q[group.rows], keys, values, sinks)
        return out

    def _attend(
        self, index: int, spec: AttentionSpec, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """q [num_sequences * num_queries, heads, key_dim] of one group -> the same with value_dim."""
        group = self.groups[index]
        batch, queries = group.shape
        heads, kv_heads = q.shape[1], spec.num_kv_heads
        k, v = (
            pages.view(-1, PAGE_SIZE * kv_heads * pages.shape[-1])
            .index_select(0, group.table)
            .view(batch, group.length, kv_heads, -1)
            .transpose(1, 2)
            for pages in (keys, values)
        )  # [batch, kv_heads, length, dim]
        grouped = q.view(batch, queries, kv_heads, heads // kv_heads, -1).permute(0, 2, 3, 1, 4)
        mask = self._mask(index, spec.window)  # [batch, 1, queries, length]
        if spec.softcap is None and sinks is None:
            repeated = mask if queries == 1 else mask.repeat(1, 1, heads // kv_heads, 1)
            out = F.scaled_dot_product_attention(grouped.flatten(2, 3), k, v, attn_mask=repeated, scale=spec.scale)
        else:
            out = _explicit(spec, grouped.flatten(2, 3), k, v, mask, sinks)
        return out.view(batch, kv_heads, -1, queries, spec.value_dim).permute(0, 3, 1, 2, 4).reshape(len(q), heads, -1)

    def _mask(self, index: int, window: int | None) -> Tensor:
        """0 where a query sees a key, else -inf; the same for all layers with one window."""
        if (index, window) not in self._masks:
            group = self.groups[index]
            at, query = torch.arange(group.length, device=self.slots.device), group.positions[:, None, :, None]
            visible = at <= query
            if window is not None:
                visible &= at > query - window
            mask = torch.zeros(visible.shape, dtype=self.cache.keys.dtype, device=visible.device)
            self._masks[index, window] = mask.masked_fill_(~visible, float("-inf"))
        return self._masks[index, window]


def _explicit(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention with a softcap or sinks: q [batch, kv_heads, group * queries, key_dim]."""
    scores = (q @ k.transpose(-1, -2)).float() * spec.scale
    if spec.softcap is not None:
        scores = (scores / spec.softcap).tanh() * spec.softcap
    scores = scores.unflatten(2, (-1, mask.shape[2])) + mask[:, :, None]
    if sinks is not None:
        column = sinks.float().view(spec.num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(q.dtype)
    return weights.flatten(2, 3) @ v


def _make_groups(spans: Sequence[Span], device: torch.device) -> list[_Group]:
    """Sequences of equally many new tokens and, when padded, equally many pages go together."""
    members: dict[tuple[int, int], list[int]] = {}
    starts, row = [], 0
    for index, span in enumerate(spans):
        members.setdefault((span.end - span.start, padded_pages(span.end)), []).append(index)
        starts.append(row)
        row += span.end - span.start
    return [
        _make_group([spans[i] for i in group], [starts[i] for i in group], row, device) for group in members.values()
    ]


def _make_group(spans: Sequence[Span], starts: Sequence[int], num_tokens: int, device: torch.device) -> _Group:
    num_pages = padded_pages(spans[0].end)
    count = spans[0].end - spans[0].start
    table = [page for span in spans for page in _padded(span.pages, num_pages)]
    rows = [start + i for start in starts for i in range(count)]
    return _Group(
        slice(None) if len(rows) == num_tokens else torch.tensor(rows, device=device),
        torch.tensor(table, device=device),
        torch.tensor([list(_range(span)) for span in spans], device=device),
        num_pages * PAGE_SIZE,
    )


def padded_pages(num_tokens: int) -> int:
    """Pages that attention reads for so many tokens, whatever the company: a power of two, or three quarters of one."""
    pages = -(-num_tokens // PAGE_SIZE)
    power = 1 << (pages - 1).bit_length()
    return power * 3 // 4 if power >= 4 and pages <= power * 3 // 4 else power


def _padded(pages: Sequence[int], count: int) -> list[int]:
    return [*pages[:count], *[0] * (count - len(pages))]


def _range(span: Span) -> range:
    return range(span.start, span.end)


def slots_of(spans: Sequence[Span]) -> list[int]:
    """Where each span's new tokens lie in the cache."""
    return [span.pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for span in spans for at in _range(span)]
