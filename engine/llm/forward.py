"""`Forward`: runs the model over one step's tokens, by the attention and graphs that the device has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...quant import UnsupportedError
from ..config import EngineConfig
from .cached_attend import CachedAttend
from .decoder import Decoder
from .kv_cache import KVCache
from .paged_attention import PagedAttention, Span
from .transfers import upload

if TYPE_CHECKING:
    from .gpu.decode_graphs import DecodeGraphs, GraphAttention
    from .gpu.flashinfer_attention import FlashInferAttention

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


def no_flashinfer(model: Decoder, config: EngineConfig) -> str | None:
    """Why attention is plain torch, or None where it is FlashInfer's; `UnsupportedError` if that was asked for."""
    if config.attention == "torch":
        return "attention='torch'"
    if config.batch_invariant and model.device.type == "cuda":
        reason = "batch_invariant=True, and its plans cut keys and choose tiles by what else is in a step"
    elif model.device.type != "cuda":
        reason = f"it runs on GPUs, this is {model.capability}"
    else:
        from .gpu.flashinfer_attention import FlashInferAttention

        reason = FlashInferAttention.unsupported(model.attention_specs, model.capability, model.dtype)
    if reason is not None and config.attention == "flashinfer":
        raise UnsupportedError("attention='flashinfer'", [reason])
    return reason


def takes_fixed_attention(model: Decoder, config: EngineConfig) -> bool:
    """Whether attention is the kernel of one order; `UnsupportedError` where it must be, on a GPU, and cannot."""
    if not config.batch_invariant or model.device.type != "cuda":
        return False  # a CPU's is invariant as it is
    from .gpu.fixed_attention import FixedAttention

    reason = FixedAttention.unsupported(model.attention_specs, model.capability, model.dtype)
    if config.attention != "auto":
        reason = f"attention={config.attention!r} depends on what else is in a step; leave it at 'auto'"
    if reason is not None:
        raise UnsupportedError("attention with batch_invariant=True", [reason])
    return True


def cache_dtype(model: Decoder, config: EngineConfig) -> torch.dtype:
    """Of keys and values: E4M3 where they are rounded to it and attention reads codes, else the engine's dtype."""
    if not model.rounds_kv:
        return model.dtype
    if takes_fixed_attention(model, config):
        reason = "batch_invariant=True, and a token's sums over codes take keys in another order than a prompt's"
    else:
        reason = no_flashinfer(model, config) or model.unwritable_as_codes()
    if reason is None:
        return torch.float8_e4m3fn
    log.info("the KV cache holds FP8's values in %s: %s", model.dtype, reason)
    return model.dtype


def make_forward(model: Decoder, cache: KVCache, config: EngineConfig) -> Forward:
    """FlashInfer's attention and CUDA graphs where they can be had and are not switched off, else plain torch; with
    `batch_invariant` a kernel of our own."""
    num_heads = model.config.attention.num_heads
    if takes_fixed_attention(model, config):
        from .gpu.fixed_attention import FixedAttention

        cache.clears_pages = False  # it reads no further than a sequence goes
        fixed = FixedAttention(cache, model.attention_specs, num_heads)
        log.info("attention on %s: in one order, for batch_invariant=True", model.capability)
        return Forward(model, cache, fixed.step, _make_graphs(model, cache, fixed, config))
    reason = no_flashinfer(model, config)
    if reason is not None:
        log.info("attention on %s: torch; not flashinfer: %s", model.capability, reason)
        return Forward(model, cache, lambda spans: PagedAttention(cache, spans))
    from .gpu.flashinfer_attention import FlashInferAttention

    attention = FlashInferAttention(cache, model.attention_specs, num_heads, model.dtype)
    log.info("attention on %s: flashinfer", model.capability)
    cache.clears_pages = False  # it reads no further than a sequence goes
    decoding = _decoding_attention(model, cache, attention, config)
    return Forward(model, cache, attention.step, _make_graphs(model, cache, decoding, config))


def _decoding_attention(
    model: Decoder, cache: KVCache, flashinfer: FlashInferAttention, config: EngineConfig
) -> GraphAttention:
    """The kernel of one order on Hopper, where it is faster than FlashInfer's, unless that was asked for by name."""
    from .gpu.fixed_attention import FixedAttention

    if config.attention == "flashinfer":
        reason = "attention='flashinfer'"
    elif model.capability.sm != 90:
        reason = f"its tiles were measured on sm90, this is {model.capability}"
    else:
        reason = FixedAttention.unsupported(model.attention_specs, model.capability, model.dtype)
    if reason is not None:
        log.info("decoding: flashinfer; not the kernel of one order: %s", reason)
        return flashinfer
    log.info("decoding: the kernel of one order")
    return FixedAttention(cache, model.attention_specs, model.config.attention.num_heads)


def _make_graphs(
    model: Decoder, cache: KVCache, attention: GraphAttention, config: EngineConfig
) -> DecodeGraphs | None:
    from .gpu.decode_graphs import DecodeGraphs

    reason = "cuda_graphs=False" if not config.cuda_graphs else model.uncapturable()
    if reason is not None:
        log.info("decoding without CUDA graphs: %s", reason)
        return None
    return DecodeGraphs(model, cache, attention, config.max_batch_size)
