"""The KV cache of a static batch (until the paged one takes over)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import AttentionSpec


class KVCache:
    """Keys and values of a batch: [num_layers, batch, kv_heads, capacity, head_dim] each."""

    def __init__(
        self,
        num_layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, batch, kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be repeated."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class Prefill:
    """Causal attention within each of several whole sequences; fills `cache` if there is one."""

    def __init__(self, lengths: Sequence[int], cache: KVCache | None = None) -> None:
        self.lengths, self.cache = list(lengths), cache

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        layer = spec.layer
        parts = (x.transpose(0, 1).split(self.lengths, dim=1) for x in (q, k, v))
        outs = []
        for row, (query, key, value) in enumerate(zip(*parts, strict=True)):
            if self.cache is not None:
                self.cache.keys[layer, row, :, : key.shape[1]] = key
                self.cache.values[layer, row, :, : key.shape[1]] = value
            repeats = query.shape[0] // key.shape[0]
            key, value = (x.repeat_interleave(repeats, dim=0) for x in (key, value))
            outs.append(F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0])
        return torch.cat(outs, dim=1).transpose(0, 1)


class Decode:
    """One new token a sequence, at `positions` [batch], against the cache."""

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        self.cache, self.positions = cache, positions
        self.rows = torch.arange(len(positions), device=positions.device)
        self.length = int(positions.max()) + 1
        visible = torch.arange(self.length, device=positions.device) <= positions[:, None]
        self.mask = visible[:, None, None]  # [batch, 1, 1, length]

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        layer = spec.layer
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        grouped = q.unflatten(1, (k.shape[1], -1))  # the heads of a KV head as its queries
        out = F.scaled_dot_product_attention(
            grouped, keys[:, :, : self.length], values[:, :, : self.length], attn_mask=self.mask
        )
        return out.flatten(1, 2)
