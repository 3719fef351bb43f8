"""Attention of decoding tokens over pages, beside softmax in float64; on a CPU in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.llm.attention import AttentionSpec  # noqa: E402
from rollmill.engine.llm.gpu.decode_attention import SplitResults, decode_attention  # noqa: E402
from rollmill.engine.llm.gpu.decode_table import MOST_SPLITS, SPLIT, DecodeTable, cut  # noqa: E402
from rollmill.engine.llm.page_pool import PAGE_SIZE  # noqa: E402
from rollmill.engine.llm.paged_attention import Span  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [1, 17, 64, 65, 256, 257, 700]


class Cache:
    """Sequences of random lengths in pages that lie in no order, poisoned where no sequence is."""

    def __init__(self, lengths, kv_heads, head_dim, dtype=torch.bfloat16):
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        generator = torch.Generator().manual_seed(sum(lengths))
        order = torch.randperm(sum(counts), generator=generator).split(counts)
        self.pages, self.lengths = [pages.tolist() for pages in order], lengths
        self.keys, self.values = (
            torch.full((sum(counts) * PAGE_SIZE, kv_heads, head_dim), float("nan"), dtype=torch.bfloat16).to(dtype)
            for _ in "kv"
        )
        for pages, length in zip(self.pages, lengths, strict=True):
            slots = self.slots(pages, length)
            for stored in (self.keys, self.values):
                stored[slots] = torch.randn(length, kv_heads, head_dim, generator=generator).bfloat16().to(dtype)

    @staticmethod
    def slots(pages, length):
        at = torch.arange(length)
        return torch.tensor(pages)[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE

    def expected(self, q, spec):
        """Float64, one sequence and head after the other."""
        out = torch.empty(q.shape, dtype=torch.float64)
        group = q.shape[1] // self.keys.shape[1]
        for row, (pages, length) in enumerate(zip(self.pages, self.lengths, strict=True)):
            seen = self.slots(pages, length)[0 if spec.window is None else max(0, length - spec.window) :]
            for head in range(q.shape[1]):
                scores = self.keys[seen, head // group].double() @ q[row, head].double() * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * (scores / spec.softcap).tanh()
                out[row, head] = scores.softmax(0) @ self.values[seen, head // group].double()
        return out

    def attend(self, q, spec, rows=None):
        rows = range(len(q)) if rows is None else rows
        table = DecodeTable(len(rows), sum(map(len, self.pages)), spec.window, DEVICE)
        results = SplitResults(len(self.lengths), q.shape[1], spec, DEVICE)
        table.plan([Span(self.pages[row], self.lengths[row] - 1, self.lengths[row]) for row in rows])
        parts = (q[list(rows)].to(DEVICE), self.keys.to(DEVICE), self.values.to(DEVICE))
        first, again = (decode_attention(*parts, table, results, spec).cpu() for _ in range(2))
        assert torch.equal(first, again)  # its counters are as they were
        return first


def make_q(rows, heads, head_dim):
    return torch.randn(rows, heads, head_dim, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 2, 64), (7, 1, 64), (4, 4, 128)], ids=["4 a head", "7 a head", "1 a head"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (100, None), (None, 5.0)], ids=["all", "window", "softcap"]
)
def test_beside_float64(heads, kv_heads, head_dim, dtype, window, softcap):
    spec = AttentionSpec(0, kv_heads, head_dim, head_dim, head_dim**-0.5, window, softcap)
    cache, q = Cache(LENGTHS, kv_heads, head_dim, dtype), make_q(len(LENGTHS), heads, head_dim)
    expected = cache.expected(q, spec)
    # weights and the result are rounded to BF16
    torch.testing.assert_close(cache.attend(q, spec).double(), expected, rtol=2**-7, atol=2**-8)


def test_a_row_knows_no_company():
    spec = AttentionSpec(0, 2, 64, 64, 0.125)
    cache, q = Cache(LENGTHS, 2, 64), make_q(len(LENGTHS), 8, 64)
    together = cache.attend(q, spec)
    for row in range(len(LENGTHS)):
        assert torch.equal(cache.attend(q, spec, [row])[0], together[row])
    assert torch.equal(cache.attend(q, spec, range(len(LENGTHS))[::-1]).flip(0), together)


@pytest.mark.parametrize("window", [None, 1, 1000])
def test_splits_cover_what_is_seen(window):
    ends = [1, SPLIT, SPLIT + 1, SPLIT * MOST_SPLITS, SPLIT * MOST_SPLITS + 1, 100_000]
    rows, items = cut(ends, window)
    for at, end in enumerate(ends):
        _, begin, first, splits = rows[at]
        mine = items[first : first + splits]
        assert begin == (0 if window is None else max(0, end - window))
        assert (mine[:, 0] == at).all()
        assert len(mine) <= MOST_SPLITS
        assert mine[0, 1] <= begin
        assert mine[-1, 2] == end
        np.testing.assert_array_equal(mine[1:, 1], mine[:-1, 2])
        alone_rows, alone = cut([end], window)
        np.testing.assert_array_equal(alone[:, 1:], mine[:, 1:])
        assert alone_rows[0, 3] == splits
