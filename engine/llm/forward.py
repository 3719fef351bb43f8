"""`Forward`: runs the model over one step's tokens, by the attention and graphs that the device has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...quant import Capability, UnsupportedError
from ..config import EngineConfig
from .cached_attend import CachedAttend
from .decoder import Decoder
from .kv_cache import KVCache
from .paged_attention import PagedAttention, Span
from .transfers import upload

if TYPE_CHECKING:
    from .gpu.decode_graphs import DecodeGraphs

log = logging.getLogger("rollmill")


class Forward:
    """Hidden states of a step; its routed experts go to the cache.

    `attend` makes the attention of a step. `graphs`, where there are any, take the steps that draw one token of each
    sequence.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        attend: Callable[[Sequence[Span]], CachedAttend],
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model, self.cache, self.attend, self.graphs = model, cache, attend, graphs

    def __call__(
        self, ids: Sequence[int], positions: Sequence[int], spans: Sequence[Span], drawn: Tensor | None = None
    ) -> Tensor:
        """Token ids and positions, span by span -> [num_tokens, hidden_size].

        An id of -1 - i stands for `drawn[i]`, a token that the host does not know yet: drawn int64 [num_drawn].
        """
        device = self.model.device
        tokens = place_drawn(upload(ids, device), drawn)
        if self.graphs is not None and len(ids) == len(spans) <= self.graphs.sizes[-1]:
            return self.graphs.run(tokens, upload(positions, device), spans)
        attend = self.attend(spans)
        routed: list[Tensor] = []
        hidden = self.model.hidden(tokens, upload(positions, device), attend, routed)
        self.cache.store_routed(attend.slots, routed)
        return hidden


def place_drawn(ids: Tensor, drawn: Tensor | None) -> Tensor:
    """int64 [num_tokens], where -1 - i stands for `drawn[i]`."""
    return ids if drawn is None else torch.where(ids < 0, drawn[(-1 - ids).clamp_(min=0)], ids)


def make_forward(model: Decoder, cache: KVCache, capability: Capability, config: EngineConfig) -> Forward:
    """FlashInfer's attention and CUDA graphs where they can be had and are not switched off, else plain torch."""
    plain = Forward(model, cache, lambda spans: PagedAttention(cache, spans))
    if config.attention == "torch" or capability.device.type != "cuda":
        if config.attention == "flashinfer":
            raise UnsupportedError("attention='flashinfer'", [f"it runs on GPUs, this is {capability}"])
        return plain
    from .gpu.flashinfer_attention import FlashInferAttention

    specs = model.attention_specs
    reason = FlashInferAttention.unsupported(specs, capability, cache.keys.dtype)
    if reason is not None:
        if config.attention == "flashinfer":
            raise UnsupportedError("attention='flashinfer'", [reason])
        log.info("attention on %s: torch; not flashinfer: %s", capability, reason)
        return plain
    attention = FlashInferAttention(cache, specs, model.config.attention.num_heads)
    log.info("attention on %s: flashinfer", capability)
    cache.clears_pages = False  # it reads no further than a sequence goes
    return Forward(model, cache, attention.step, _make_graphs(model, cache, attention, config))


def _make_graphs(model: Decoder, cache: KVCache, attention: object, config: EngineConfig) -> DecodeGraphs | None:
    from .gpu.decode_graphs import DecodeGraphs
    from .gpu.flashinfer_attention import FlashInferAttention

    assert isinstance(attention, FlashInferAttention)
    reason = "cuda_graphs=False" if not config.cuda_graphs else model.uncapturable()
    if reason is not None:
        log.info("decoding without CUDA graphs: %s", reason)
        return None
    return DecodeGraphs(model, cache, attention, config.max_batch_size)
