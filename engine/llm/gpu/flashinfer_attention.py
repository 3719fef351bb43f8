"""Paged attention through FlashInfer's FA2 kernels, for steps of any mixture and for decoding steps in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from ....quant import Capability
from ....quant.flashinfer_api.library import import_flashinfer
from ..attention import AttentionSpec
from ..cached_attend import CachedAttend
from ..kv_cache import KVCache
from ..page_pool import PAGE_SIZE
from ..paged_attention import Span, slots_of
from ..transfers import upload

WORKSPACE_BYTES = 256 << 20
HEAD_DIMS = (64, 128, 256)


class Kind(Struct, frozen=True):
    """What a plan is made for: layers that agree in it share one."""

    window: int | None
    softcap: float | None
    scale: float


class FlashInferAttention:
    """Attention of one engine: workspace, and wrappers that are planned once a step for all layers of a kind."""

    def __init__(self, cache: KVCache, specs: Sequence[AttentionSpec], num_heads: int, dtype: torch.dtype) -> None:
        self.cache, self.num_heads, self.dtype = cache, num_heads, dtype
        self.kinds = {kind_of(spec) for spec in specs}
        self.num_kv_heads, self.head_dim = specs[0].num_kv_heads, specs[0].key_dim
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=cache.keys.device)
        self._plan_read = torch.cuda.Event()
        self._eager = {kind: self._prefill_wrapper() for kind in self.kinds}

    @staticmethod
    def unsupported(specs: Sequence[AttentionSpec], capability: Capability, dtype: torch.dtype) -> str | None:
        """Why FlashInfer cannot attend here, or None."""
        if capability.sm is None or capability.sm < 80:
            return f"runs on sm80 and later, this is {capability}"
        if capability.flashinfer is None:
            return capability.no_flashinfer
        if dtype not in (torch.bfloat16, torch.float16):
            return f"computes in bfloat16 and float16, not {dtype}"
        for spec in specs:
            if spec.key_dim != spec.value_dim or spec.key_dim not in HEAD_DIMS:
                return f"has heads of {HEAD_DIMS}, not keys of {spec.key_dim} and values of {spec.value_dim}"
            if spec.sinks:
                return "has no sinks"
        return None

    def step(self, spans: Sequence[Span]) -> StepAttention:
        """Attention for any step: each span's tokens see their sequence up to themselves."""
        counts = [span.end - span.start for span in spans]
        starts = torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32)).pin_memory()
        with self.planning(spans) as tables:
            for kind, wrapper in self._eager.items():
                wrapper.plan(
                    starts,
                    *tables,
                    self.num_heads,
                    self.num_kv_heads,
                    self.head_dim,
                    PAGE_SIZE,
                    causal=True,
                    **self._options(kind),
                )
        return StepAttention(self.cache, upload(slots_of(spans), self.cache.keys.device), self._eager)

    @contextmanager
    def planning(self, spans: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Page tables as plans want them, so that no plan waits for the GPU; FlashInfer copies out of pinned buffers
        of its own, which must have been read before they are written again."""
        self._plan_read.synchronize()
        starts, pages, last = (table.pin_memory() for table in make_tables(spans))
        yield starts, pages.to(self.cache.keys.device, non_blocking=True), last
        self._plan_read.record(torch.cuda.current_stream(self.cache.keys.device))

    def decode_step(self, batch_size: int, max_pages: int) -> FlashInferDecodeStep:
        """Attention for a CUDA graph: one new token of each of `batch_size` sequences, of `max_pages` pages in all."""
        return FlashInferDecodeStep(self, batch_size, max_pages)

    def _prefill_wrapper(self) -> Any:
        kind = import_flashinfer().BatchPrefillWithPagedKVCacheWrapper
        return kind(self.workspace, "NHD", backend="fa2")

    def _options(self, kind: Kind) -> dict[str, Any]:
        return {
            "window_left": -1 if kind.window is None else kind.window - 1,
            "logits_soft_cap": kind.softcap,
            "sm_scale": kind.scale,
            "q_data_type": self.dtype,
            "kv_data_type": self.cache.keys.dtype,
        }


class StepAttention(CachedAttend):
    """Attends with what was planned for the step."""

    def __init__(self, cache: KVCache, slots: Tensor, wrappers: dict[Kind, Any]) -> None:
        self.cache, self.slots, self.wrappers = cache, slots, wrappers

    def read(self, spec: AttentionSpec, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        assert sinks is None
        pages = tuple(
            tensor[spec.layer].view(-1, PAGE_SIZE, *tensor.shape[2:]) for tensor in (self.cache.keys, self.cache.values)
        )
        return self.wrappers[kind_of(spec)].run(q.contiguous(), pages)


class FlashInferDecodeStep(StepAttention):
    """The same at fixed addresses: `plan` writes a step's tables into the buffers that a captured graph reads."""

    def __init__(self, attention: FlashInferAttention, batch_size: int, max_pages: int) -> None:
        device = attention.cache.keys.device
        self.attention, self.batch_size = attention, batch_size
        kind = import_flashinfer().BatchDecodeWithPagedKVCacheWrapper
        wrappers = {
            one: kind(
                attention.workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=torch.zeros(batch_size + 1, dtype=torch.int32, device=device),
                paged_kv_indices_buffer=torch.zeros(max_pages, dtype=torch.int32, device=device),
                paged_kv_last_page_len_buffer=torch.ones(batch_size, dtype=torch.int32, device=device),
            )
            for one in attention.kinds
        }
        super().__init__(attention.cache, torch.zeros(batch_size, dtype=torch.long, device=device), wrappers)

    def plan(self, spans: Sequence[Span]) -> None:
        """Spans of one token each; where there are fewer than `batch_size`, the rest reads and writes page 0."""
        spans = [*spans, *[Span([0], 0, 1)] * (self.batch_size - len(spans))]
        owner = self.attention
        with owner.planning(spans) as tables:
            for kind, wrapper in self.wrappers.items():
                options = owner._options(kind)
                wrapper.plan(*tables, owner.num_heads, owner.num_kv_heads, owner.head_dim, PAGE_SIZE, **options)
        self.slots.copy_(upload(slots_of(spans), self.slots.device))


def kind_of(spec: AttentionSpec) -> Kind:
    return Kind(spec.window, spec.softcap, spec.scale)


def make_tables(spans: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
    """int32 on the host: where each span's pages begin [n + 1], all pages, how many tokens its last one holds [n]."""
    counts = [-(-span.end // PAGE_SIZE) for span in spans]
    starts = np.cumsum([0, *counts], dtype=np.int32)
    pages = chain.from_iterable(span.pages[:count] for span, count in zip(spans, counts, strict=True))
    numbers = np.fromiter(pages, dtype=np.int32, count=int(starts[-1]))
    last = np.array([(span.end - 1) % PAGE_SIZE + 1 for span in spans], dtype=np.int32)
    return torch.from_numpy(starts), torch.from_numpy(numbers), torch.from_numpy(last)
