"""`DecodeTable`: where the sequences of a decoding step lie in the KV cache, and how attention cuts them up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from ..page_pool import PAGE_SIZE
from ..paged_attention import Span

BLOCK = 64  # tokens that a program attends to at once
SPLIT = 256  # tokens of a split, of sequences of up to SPLIT * MOST_SPLITS tokens
MOST_SPLITS = 32


class DecodeTable:
    """Tables of a step at fixed addresses on the device, of `batch_size` sequences in `max_pages` pages in all.

    int32: `count` [1] (splits of all sequences), `rows` [batch_size, 4] (a sequence's first entry in `pages`, its first
    visible token, its first split, its number of splits), `items` [splits, 4] (a split's sequence, its tokens from, up
    to), `pages`.
    """

    def __init__(self, batch_size: int, max_pages: int, window: int | None, device: torch.device) -> None:
        self.batch_size, self.window = batch_size, window
        self.max_items = batch_size * MOST_SPLITS
        sizes = [4, 4 * batch_size, 4 * self.max_items, max_pages]
        self._all = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.count, self.rows, self.items, self.pages = self._all.split(sizes)

    def plan(self, spans: Sequence[Span]) -> None:
        """Tables of these spans of one token each, `batch_size` at the most."""
        counts = np.array([-(-span.end // PAGE_SIZE) for span in spans])
        used = chain.from_iterable(span.pages[:count] for span, count in zip(spans, counts, strict=True))
        rows, items = cut([span.end for span in spans], self.window)
        rows[:, 0] = np.cumsum(counts) - counts
        whole = np.zeros(self._all.numel() - self.pages.numel() + int(counts.sum()), dtype=np.int32)
        count, row_part, item_part, pages = np.split(whole, np.cumsum([4, 4 * self.batch_size, 4 * self.max_items]))
        count[0] = len(items)
        row_part[: rows.size] = rows.ravel()
        item_part[: items.size] = items.ravel()
        pages[:] = np.fromiter(used, dtype=np.int32, count=len(pages))
        told = torch.from_numpy(whole)
        if self._all.is_cuda:
            told = told.pin_memory()
        self._all[: len(told)].copy_(told, non_blocking=True)


def cut(ends: Sequence[int], window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of so many tokens -> int32 `rows` [num_sequences, 4], the first column 0, and `items` [splits, 4].

    Splits begin at multiples of their size, which grows with the sequence alone, so that there are `MOST_SPLITS` of
    it at the most; the first one begins at the block of the first token that the window lets see.
    """
    end = np.asarray(ends, dtype=np.int64)
    begin = np.zeros_like(end) if window is None else np.maximum(0, end - window)
    size = np.full_like(end, SPLIT)
    while (long := size * MOST_SPLITS < end).any():
        size = np.where(long, size * 2, size)
    first = begin // size
    splits = (end - 1) // size - first + 1
    offset = np.cumsum(splits) - splits
    sequence = np.repeat(np.arange(len(end)), splits)
    number = first[sequence] + np.arange(len(sequence)) - offset[sequence]
    start = np.maximum(number * size[sequence], begin[sequence] // BLOCK * BLOCK)
    stop = np.minimum((number + 1) * size[sequence], end[sequence])
    rows = np.stack((np.zeros_like(end), begin, offset, splits), 1)
    items = np.stack((sequence, start, stop, np.zeros_like(start)), 1)
    return rows.astype(np.int32), items.astype(np.int32)
