"""`DecodeGraphs`: a decoding step as one CUDA graph, for each of a few batch sizes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..attention import Attend
from ..decoder import Decoder
from ..kv_cache import KVCache
from ..page_pool import PAGE_SIZE
from ..paged_attention import Span

log = logging.getLogger("rollmill")


class GraphAttend(Attend, Protocol):
    """Attention of one new token of each sequence, at fixed addresses."""

    slots: Tensor

    def plan(self, spans: Sequence[Span]) -> None:
        """Write a step's tables; sequences that are missing read and write page 0."""
        ...


class GraphAttention(Protocol):
    """What makes such attention."""

    def decode_step(self, batch_size: int, max_pages: int) -> GraphAttend: ...


class DecodeGraphs:
    """Captured when a batch size first comes; stays valid through swaps, which write packed tensors in place.

    Rows beyond the sequences at hand compute a token that nobody reads.
    """

    def __init__(self, model: Decoder, cache: KVCache, attention: GraphAttention, max_batch_size: int) -> None:
        self.model, self.cache, self.attention = model, cache, attention
        self.sizes = batch_sizes(max_batch_size)
        self._graphs: dict[int, DecodeGraph] = {}
        self._place: Any = None  # of all graphs: pool and stream

    def run(self, ids: Tensor, positions: Tensor, spans: Sequence[Span]) -> Tensor:
        """One new token of each sequence, int64 [num_sequences], -> hidden states [num_sequences, hidden_size], valid
        until the next run."""
        size = next(size for size in self.sizes if size >= len(spans))
        if size not in self._graphs:
            self._capture(size)
        return self._graphs[size].run(ids, positions, spans)[: len(spans)]

    def capture_all(self) -> None:
        """Capture every size now, the largest first, so that the others fit into its memory."""
        for size in reversed(self.sizes):
            if size not in self._graphs:
                self._capture(size)

    def forget(self) -> None:
        """Drop all graphs: memory that they read has moved."""
        self._graphs.clear()

    def _capture(self, size: int) -> None:
        start = time.perf_counter()
        if not self._graphs:  # a pool that no graph uses any more takes no other, and lends memory in one stream only
            self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.model.device)
        self._graphs[size] = DecodeGraph(self.model, self.cache, self.attention, size, *self._place)
        log.info("captured a decoding step of %d sequences in %.1f s", size, time.perf_counter() - start)


class DecodeGraph:
    """One batch size."""

    def __init__(
        self, model: Decoder, cache: KVCache, attention: GraphAttention, size: int, pool: Any, stream: Any
    ) -> None:
        self.model, self.cache, device = model, cache, model.device
        self.ids = torch.zeros(size, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        longest = min(cache.num_pages, -(-model.config.max_position // PAGE_SIZE))  # pages of one sequence
        self.attend = attention.decode_step(size, size * longest)
        self.graph = torch.cuda.CUDAGraph()
        self.attend.plan([])
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles what compiles on first use
                self._forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        # a swap in another thread takes memory meanwhile, which the default mode forbids to all threads
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.hidden = self._forward()

    def _forward(self) -> Tensor:
        routed: list[Tensor] = []
        hidden = self.model.hidden(self.ids, self.positions, self.attend, routed)
        self.cache.store_routed(self.attend.slots, routed)
        return hidden

    def run(self, ids: Tensor, positions: Tensor, spans: Sequence[Span]) -> Tensor:
        self.attend.plan(spans)
        self.ids[: len(ids)] = ids
        self.positions[: len(ids)] = positions
        self.graph.replay()
        return self.hidden


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 up to 64, of 16 up to 128, of 32 beyond."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, largest + 32, 32)]
    return [*(size for size in sizes if size < largest), largest]
