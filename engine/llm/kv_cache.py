"""`KVCache`: keys, values and routed experts of all tokens in flight, in pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...quant import ConfigError, UnsupportedError
from ...weight_sync import AsleepError
from .attention import AttentionSpec
from .page_pool import PAGE_SIZE


class KVCache:
    """A slot (page * PAGE_SIZE + offset) holds one token's keys and values in all layers, and its routed experts.

    keys, values: [num_layers, num_slots, kv_heads, key_dim | value_dim], as numbers or as E4M3 codes; routed: int16
    [num_slots, num_moe_layers, top_k]. With `clears_pages` pages are zeroed when they are handed out: where attention
    reads whole pages, zero times what an earlier request left there must be zero.
    """

    clears_pages = True

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        routing: tuple[int, int],
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shapes = {(spec.num_kv_heads, spec.key_dim, spec.value_dim) for spec in specs}
        if len(shapes) != 1:
            raise UnsupportedError(
                f"a KV cache for layers of {len(shapes)} shapes", ["all layers must have equal KV heads and sizes"]
            )
        heads, key_dim, value_dim = shapes.pop()
        slots = num_pages * PAGE_SIZE
        try:
            self.keys = torch.empty(len(specs), slots, heads, key_dim, dtype=dtype, device=device)
            self.values = torch.empty(len(specs), slots, heads, value_dim, dtype=dtype, device=device)
            self.routed = torch.empty(slots, *routing, dtype=torch.int16, device=device)
        except (RuntimeError, MemoryError) as error:  # torch's CPU allocator has no type of its own
            raise ConfigError(_what_fits(slots, self.bytes_per_token(specs, routing, dtype), device)) from error
        self.asleep = False
        self.clear([0])

    @staticmethod
    def bytes_per_token(specs: Sequence[AttentionSpec], routing: tuple[int, int], dtype: torch.dtype) -> int:
        values = sum(spec.num_kv_heads * (spec.key_dim + spec.value_dim) for spec in specs)
        return values * dtype.itemsize + routing[0] * routing[1] * torch.int16.itemsize

    @property
    def holds_codes(self) -> bool:
        """Whether keys and values are E4M3 codes."""
        return self.keys.dtype == torch.float8_e4m3fn

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.routed

    @property
    def num_pages(self) -> int:
        return self.keys.shape[1] // PAGE_SIZE

    @property
    def num_bytes(self) -> int:
        """Memory held now."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def check_awake(self) -> None:
        """Raise `AsleepError` between `free` and `allocate`."""
        if self.asleep:
            raise AsleepError('the KV cache is asleep; wake it first: wake(("kv_cache",))')

    def free(self) -> None:
        """Give the memory back; the tensors stay and are empty."""
        self.asleep = True
        for tensor in self.tensors:
            tensor.untyped_storage().resize_(0)

    def allocate(self) -> None:
        """Take memory again after `free`."""
        if not self.asleep:
            return
        for tensor in self.tensors:
            tensor.untyped_storage().resize_(tensor.nbytes)
        self.asleep = False
        self.clear([0])

    def clear(self, pages: Sequence[int]) -> None:
        """Zero these pages."""
        at = torch.tensor(pages, device=self.keys.device)
        for pages_of in self._pages():
            pages_of[:, at] = 0

    def _pages(self) -> Iterator[Tensor]:
        """Keys and values [num_layers, num_pages, PAGE_SIZE, ...]; codes as bytes, which torch can index."""
        for tensor in (self.keys, self.values):
            yield (tensor.view(torch.uint8) if self.holds_codes else tensor).unflatten(1, (-1, PAGE_SIZE))

    def store_routed(self, slots: Tensor, routed: Sequence[Tensor]) -> None:
        """Keep the expert ids [num_tokens, top_k] that every MoE layer chose for the tokens at `slots`."""
        if routed:
            self.routed[slots] = torch.stack(list(routed), dim=1).to(torch.int16)

    def copy(self, source: int, target: int) -> None:
        """Copy one page onto another."""
        for pages_of in self._pages():
            pages_of[:, target] = pages_of[:, source]
        routed = self.routed.unflatten(0, (-1, PAGE_SIZE))
        routed[target] = routed[source]

    def routed_of(self, pages: Sequence[int], count: int) -> Tensor:
        """Routed experts int16 [count, num_moe_layers, top_k] of a sequence's first `count` tokens."""
        at = torch.tensor(pages, dtype=torch.long, device=self.routed.device)
        return self.routed.unflatten(0, (-1, PAGE_SIZE))[at].flatten(0, 1)[:count].cpu()


def _what_fits(slots: int, bytes_per_token: int, device: torch.device) -> str:
    wanted = f"{slots} tokens of {bytes_per_token} bytes each, {slots * bytes_per_token / 2**30:.1f} GiB"
    if device.type != "cuda":
        return f"no memory for a KV cache of {wanted}; set EngineConfig(kv_cache_tokens=...) lower"
    free = torch.cuda.mem_get_info(device)[0]
    return (
        f"no memory for a KV cache of {wanted}: {free / 2**30:.1f} GiB are free, room for "
        f"{free // bytes_per_token // PAGE_SIZE * PAGE_SIZE} tokens at the most; set EngineConfig(kv_cache_tokens=...)"
    )
