"""Attention in one order of sums against float64; on a GPU or in the interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from msgspec import Struct
from torch import Tensor

from rollmill.engine.llm.attention import AttentionSpec
from rollmill.engine.llm.page_pool import PAGE_SIZE
from rollmill.engine.llm.paged_attention import Span
from rollmill.quant import Capability, UnsupportedError, find_capability

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.llm.gpu import fixed_attention as fixed  # noqa: E402 (after the conftest's set-up)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS, STARTS = (5, 300, 77, 530), (0, 297, 73, 528)  # the last one begins in its third part
PAST = 3.0  # what unused slots hold: nobody may read them


class Kind(Struct, frozen=True):
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16


KINDS = {
    "4 of 2": Kind(4, 2, 64),
    "7 of 1, odd size": Kind(7, 1, 40),
    "window": Kind(8, 1, 64, window=30),
    "wide window": Kind(4, 2, 64, window=300),
    "softcap": Kind(4, 2, 64, softcap=5.0),
    "codes": Kind(4, 2, 64, dtype=torch.float8_e4m3fn),
}
WITHOUT_CODES = [kind for kind in KINDS.values() if kind.dtype == torch.bfloat16]
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


class Step:
    """Some sequences' new tokens, of which all keys and values lie in shuffled pages."""

    def __init__(self, kind: Kind, lengths: tuple[int, ...] = LENGTHS, starts: tuple[int, ...] = STARTS) -> None:
        generator = torch.Generator().manual_seed(kind.heads + kind.dim)
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        pages = [[order.pop() for _ in range(count)] for count in counts]
        self.spans = [Span(own, start, end) for own, start, end in zip(pages, starts, lengths, strict=True)]
        shape = ((sum(counts) + 1) * PAGE_SIZE, kind.kv_heads, kind.dim)
        self.keys, self.values = (torch.randn(shape, generator=generator).to(kind.dtype).to(DEVICE) for _ in range(2))
        num_tokens = sum(lengths) - sum(starts)
        self.q = torch.randn(num_tokens, kind.heads, kind.dim, generator=generator).mul(2).bfloat16().to(DEVICE)
        self.spec = AttentionSpec(0, kind.kv_heads, kind.dim, kind.dim, kind.dim**-0.5, kind.window, kind.softcap)

    def expected(self) -> Tensor:
        """In float64."""
        parts = self.q.split([span.end - span.start for span in self.spans])
        return torch.cat([self._attend(span, q) for span, q in zip(self.spans, parts, strict=True)])

    def _attend(self, span: Span, q: Tensor) -> Tensor:
        slots = torch.tensor([span.pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(span.end)])
        group = q.shape[1] // self.spec.num_kv_heads
        k, v = (t[slots.to(DEVICE)].double().repeat_interleave(group, 1) for t in (self.keys, self.values))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * self.spec.scale
        if self.spec.softcap is not None:
            scores = (scores / self.spec.softcap).tanh() * self.spec.softcap
        at, key = torch.arange(span.start, span.end)[:, None], torch.arange(span.end)
        seen = key <= at if self.spec.window is None else (key <= at) & (key > at - self.spec.window)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen.to(DEVICE), float("-inf")).softmax(-1), v)

    def as_prompts(self, shape: fixed.Shape = fixed.SHAPE) -> Tensor:
        rows = [sum(s.end - s.start for s in self.spans[:i]) for i in range(len(self.spans))]
        group, out = self.q.shape[1] // self.spec.num_kv_heads, torch.full_like(self.q, torch.nan)
        tables = fixed.prompt_tables(self.spans, rows, group, shape)
        prompts = fixed.Prompts(*(torch.from_numpy(table).to(DEVICE) for table in tables))
        fixed.attend_prompts(self.q, self.keys, self.values, out, prompts, self.spec, shape)
        return out

    def as_tokens(self, shape: fixed.Shape = fixed.SHAPE) -> Tensor:
        """Every token as the last one of a sequence; the scratch is poisoned."""
        singles = [Span(span.pages, at, at + 1) for span in self.spans for at in range(span.start, span.end)]
        tables = fixed.token_tables(singles, range(len(singles)), self.spec.num_kv_heads, shape)
        tokens, out = (
            fixed.Tokens(*(torch.from_numpy(t).to(DEVICE) for t in tables)),
            torch.full_like(self.q, torch.nan),
        )
        scratch = fixed.Scratch(len(tokens.items), self.q.shape[1], self.spec.num_kv_heads, self.q.shape[2], DEVICE)
        for sums in (scratch.peaks, scratch.masses, scratch.totals):
            sums.fill_(torch.nan)
        fixed.attend_tokens(self.q, self.keys, self.values, out, tokens, scratch, self.spec, shape)
        assert not scratch.ended.any()  # the next launch counts from zero
        return out


@each_kind
def test_prompts_and_single_tokens(kind):
    step = Step(kind)
    expected = step.expected()
    for out in (step.as_prompts(), step.as_tokens()):
        assert (out.double() - expected).norm() < 4e-3 * expected.norm()


@each_kind
def test_parts_of_several_programs_have_the_same_bits(kind):
    """Sequences cut into parts, and sequences in one piece."""
    step = Step(kind)
    assert torch.equal(step.as_tokens(), step.as_tokens(fixed.Shape(items=1)))


def test_a_peak_in_a_later_part():
    """Each part of the keys outweighs those before it by far."""
    step = Step(Kind(2, 1, 32), (600,), (597,))
    for at in range(600):
        step.keys[step.spans[0].pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE] *= 1 + at // 100
    expected = step.expected()
    for out in (step.as_prompts(), step.as_tokens()):
        assert (out.double() - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*WITHOUT_CODES, Kind(32, 4, 128)], ids=str)
def test_a_token_has_the_same_bits_in_any_step(kind):
    """Of a prompt in tiles of any size, or alone; where the cache holds BF16. E4M3 codes are widened in registers, and
    there the compiler lets a single token's sums take keys in another order."""
    try:
        reason = fixed.FixedAttention.unsupported([], find_capability("cuda"), torch.bfloat16)
    except UnsupportedError as error:
        reason = str(error)
    if reason is not None:
        pytest.skip(reason)
    step = Step(kind, (5, 300, 77, 1530, 700), (0, 280, 0, 1400, 650))
    want = step.as_prompts()
    assert torch.equal(step.as_tokens(), want)
    assert torch.equal(step.as_prompts(fixed.Shape(prompt_rows=64)), want)
    assert torch.equal(Step.as_tokens(step, fixed.Shape(part_warps=2)), want)


def test_tables_of_single_tokens():
    spans = [Span([4, 5], 20, 21), Span([7], 0, 1), Span(list(range(10, 50)), 600, 601)]
    sequences, first_item, items, pages = fixed.token_tables(spans, [2, 0, 1], 4)
    assert sequences.tolist() == [[2, 21, 0], [0, 1, 2], [1, 601, 3]]
    assert first_item.tolist() == [0, 1, 2, 5]
    assert items.tolist() == [[0, 0, 1], [1, 0, 1], [2, 0, 1], [2, 1, 2], [2, 2, 3]]
    assert pages.tolist() == [4, 5, 7, *range(10, 48)]
    whole = fixed.token_tables(spans, [2, 0, 1], 4, fixed.Shape(items=4))
    assert whole[1].tolist() == [0, 1, 2, 3]
    assert whole[2].tolist() == [[0, 0, 1], [1, 0, 1], [2, 0, 3]]
    many = fixed.token_tables(spans, [2, 0, 1], 4, fixed.Shape(enough=12))
    assert many[2].tolist() == whole[2].tolist()


@pytest.mark.parametrize(("batch", "length"), [(24, 2000), (16, 1040), (8, 4112), (3, 16)])
def test_tables_of_a_graph_have_room_for_every_part(batch, length):
    """Of sequences that are as long as can be, and whose last parts are short."""
    owner = SimpleNamespace(cache=None, scratch=None, device=torch.device("cpu"), kv_heads=2)
    pages = -(-length // PAGE_SIZE)
    decode = fixed.FixedDecode(owner, batch, batch * pages)
    spans = [Span(list(range(at * pages, (at + 1) * pages)), length - 1, length) for at in range(batch)]
    decode.plan(spans)
    sequences, first_item, items, used = fixed.token_tables(spans, range(batch), 2)
    tokens = decode.tokens
    assert tokens.sequences.tolist() == sequences.tolist()
    assert tokens.first_item[: batch + 1].tolist() == first_item.tolist()
    assert tokens.items[: len(items)].tolist() == items.tolist()
    assert tokens.pages[: len(used)].tolist() == used.tolist()


def test_tables_of_prompts():
    """Tiles that see the most keys come first."""
    spans = [Span([3], 2, 9), Span([4, 6], 20, 23)]
    tiles, first_page, pages = fixed.prompt_tables(spans, [0, 7], 16, fixed.Shape(prompt_rows=64))
    assert tiles.tolist() == [[1, 7, 20, 3], [0, 4, 6, 3], [0, 0, 2, 4]]
    assert first_page.tolist() == [0, 1]
    assert pages.tolist() == [3, 4, 6]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"sinks": True}, "sinks"), ({"value_dim": 64}, "keys of 128 and values of 64"), ({"key_dim": 80}, "keys of 80")],
    ids=["sinks", "unequal", "size"],
)
def test_what_it_does_not_compute(change, reason):
    numbers = {"key_dim": 128, "value_dim": 128, "sinks": False} | change
    spec = AttentionSpec(layer=0, num_kv_heads=2, scale=1.0, **numbers)
    hopper = Capability(torch.device("meta"), 90, ("triton",))
    assert reason in str(fixed.FixedAttention.unsupported([spec], hopper, torch.bfloat16))
    assert "float32" in str(fixed.FixedAttention.unsupported([], hopper, torch.float32))
    assert "cpu" in str(fixed.FixedAttention.unsupported([], Capability(torch.device("cpu"), None, ()), torch.bfloat16))
