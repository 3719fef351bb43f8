"""`CachedAttend`: what attention over the paged KV cache shares, whoever computes it."""

from __future__ import annotations

from torch import Tensor

from .attention import AttentionSpec
from .kv_cache import KVCache


class CachedAttend:
    """Writes keys and values of the tokens at hand to their `slots` (int64 [num_tokens]) of the cache, then reads."""

    cache: KVCache
    slots: Tensor

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        assert not self.cache.holds_codes, "codes are written by `norm_rope_write`"
        self.cache.keys[spec.layer].index_copy_(0, self.slots, k)
        self.cache.values[spec.layer].index_copy_(0, self.slots, v)
        return self.read(spec, q, sinks)

    def read(self, spec: AttentionSpec, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        """As `__call__`, where the cache holds these tokens' keys and values already."""
        raise NotImplementedError
