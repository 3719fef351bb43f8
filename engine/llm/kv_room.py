"""How many pages of keys and values an engine takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...quant import UnsupportedError, WeightSlot
from ...weight_sync import free_bytes, staging_bytes
from ..config import EngineConfig
from ..errors import ConfigError
from .decoder import Decoder
from .forward import cache_dtype
from .kv_cache import KVCache
from .page_pool import PAGE_SIZE

UNASKED_BYTES = 2 << 30  # the most that the KV cache takes unasked
GIB = 2**30


def num_pages(model: Decoder, config: EngineConfig, slots: Iterable[WeightSlot]) -> int:
    """Pages of the KV cache, and one that pads; `slots`: whose weights are in place already."""
    if config.kv_cache_tokens is not None:
        return -(-config.kv_cache_tokens // PAGE_SIZE) + 1
    room = UNASKED_BYTES
    if config.memory_fraction is not None:
        room = _room(config.memory_fraction, model.device, staging_bytes(slots, config.swap))
    per_page = PAGE_SIZE * KVCache.bytes_per_token(model.attention_specs, model.routing, cache_dtype(model, config))
    wanted = -(-config.max_batch_size * model.config.max_position // PAGE_SIZE)
    return min(wanted, room // per_page) + 1


def _room(fraction: float, device: torch.device, staging: int) -> int:
    """Bytes that may be taken until so much of a GPU is in use, a swap's second copy included."""
    if device.type != "cuda":
        raise UnsupportedError(f"memory_fraction={fraction}", ["it is of a GPU's memory: set kv_cache_tokens"])
    total, free = torch.cuda.get_device_properties(device).total_memory, free_bytes(device)
    room = free - int((1 - fraction) * total) - staging
    if room <= 0:
        raise ConfigError(
            f"memory_fraction={fraction} leaves nothing for keys and values: {(total - free) / GIB:.1f} of "
            f"{total / GIB:.1f} GiB are in use, and swaps need {staging / GIB:.1f} more; a larger fraction, "
            "swap='host' or 'streamed' would leave some"
        )
    return room
