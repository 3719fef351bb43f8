"""Norm, rotation and KV write in one launch against the torch code of `layers`, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from msgspec import Struct

from rollmill.engine.llm.layers.norms import NORMS, NormName
from rollmill.engine.llm.layers.rope import Rope, rotary, select_rotate
from rollmill.quant.numerics import quantize_fp8_activation

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.llm.gpu.qkv import norm_rope_write  # noqa: E402 (after the conftest's set-up)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, SLOTS = 1e-6, 40


class Heads(Struct, frozen=True):
    q: int
    kv: int
    dim: int
    rotary_dim: int


SHAPES = {
    "4 of 2": Heads(4, 2, 32, 32),
    "8 of 4, 4 a program": Heads(8, 4, 16, 16),
    "7 of 1": Heads(7, 1, 64, 64),
    "6 of 3, odd size": Heads(6, 3, 24, 24),
    "partly turned": Heads(4, 2, 32, 16),
    "partly turned, odd size": Heads(4, 4, 40, 12),
}
shapes = pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES.keys())


class Step:
    """One step's inputs; the cache is poisoned."""

    def __init__(self, heads: Heads, tokens: int, *, exact: bool = False) -> None:
        generator = torch.Generator().manual_seed(tokens + heads.dim)
        self.heads, width = heads, (heads.q + 2 * heads.kv) * heads.dim
        qkv = torch.randn(tokens, width, generator=generator) * 2
        if exact:  # sums of squares of small integers are exact in any order
            qkv = torch.randint(-15, 16, (tokens, width), generator=generator)
        self.qkv = qkv.bfloat16().to(DEVICE)
        inv_freq = 1 / 100 ** (torch.arange(0, heads.rotary_dim, 2) / heads.rotary_dim)
        self.rope = Rope(inv_freq.to(DEVICE))
        positions = torch.randint(0, 5000, (tokens,), generator=generator).to(DEVICE)
        self.rotary = rotary(self.rope.inv_freq, 1.0, positions, torch.bfloat16)
        self.norms = tuple(torch.randn(heads.dim, generator=generator).bfloat16().to(DEVICE) for _ in range(2))
        self.slots = torch.randperm(SLOTS, generator=generator)[:tokens].to(DEVICE)
        self.cache = torch.full((2, SLOTS, heads.kv, heads.dim), 77.0, dtype=torch.bfloat16, device=DEVICE)

    def fused(self, kind: NormName | None, slots: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        cache = self.cache.clone()
        norms = None if kind is None else self.norms
        slots = self.slots if slots is None else slots
        q = norm_rope_write(self.qkv, norms, EPS, kind or "rms", self.rotary, slots, *cache, self.heads.q)
        return q, *cache

    def torch(self, kind: NormName | None) -> tuple[torch.Tensor, ...]:
        heads, cache = self.heads, self.cache.clone()
        split = [count * heads.dim for count in (heads.q, heads.kv, heads.kv)]
        q, k, v = (part.unflatten(-1, (-1, heads.dim)) for part in self.qkv.split(split, -1))
        if kind is not None:
            q, k = (NORMS[kind](part, weight, EPS) for part, weight in zip((q, k), self.norms, strict=True))
        rotate = select_rotate(self.rope, heads.dim)
        q, k = rotate(q, *self.rotary), rotate(k, *self.rotary)
        cache[0].index_copy_(0, self.slots, k)
        cache[1].index_copy_(0, self.slots, v)
        return q, *cache


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(torch.atleast_1d(x).contiguous().view(torch.uint8) for x in (a, b)))


@shapes
@pytest.mark.parametrize("tokens", [1, 5])
def test_rotation_and_write_have_torchs_bits(heads: Heads, tokens: int):
    step = Step(heads, tokens)
    assert all(same_bits(a, b) for a, b in zip(step.fused(None), step.torch(None), strict=True))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    "heads", [SHAPES[name] for name in ("4 of 2", "partly turned")], ids=["whole", "partly turned"]
)
def test_norms_have_torchs_bits_where_the_sum_is_exact(heads: Heads, kind: NormName):
    step = Step(heads, 6, exact=True)
    assert all(same_bits(a, b) for a, b in zip(step.fused(kind), step.torch(kind), strict=True))


@shapes
def test_norms_equal_torch(heads: Heads):
    """A step of BF16 before the rotation is at most one of the larger summand after it."""
    step = Step(heads, 5)
    for found, expected in zip(step.fused("rms"), step.torch("rms"), strict=True):
        assert float((found != expected).float().mean()) <= 1e-3
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-5)


def test_padding_tokens_are_written_nowhere():
    step = Step(SHAPES["4 of 2"], 5)
    slots = step.slots.clone()
    slots[[1, 4]] = -1
    q, keys, values = step.fused("rms", slots)
    whole = step.fused("rms")
    assert same_bits(q, whole[0])
    for cache, full in ((keys, whole[1]), (values, whole[2])):
        written = (cache != 77).flatten(1).any(-1).nonzero()[:, 0]
        assert written.tolist() == sorted(slots[slots >= 0].tolist())
        assert same_bits(cache[written], full[written])


def test_an_fp8_cache_gets_codes_and_a_bf16_one_what_they_stand_for():
    """Some values lie beyond 448 times the scale."""
    step = Step(SHAPES["4 of 2"], 5)
    scales = tuple(torch.tensor([scale], device=DEVICE) for scale in (0.004, 0.0123))
    q, *plain = step.fused(None)
    codes = step.cache.to(torch.float8_e4m3fn)
    rounded = step.cache.clone()
    for cache in (codes, rounded):
        found = norm_rope_write(step.qkv, None, EPS, "rms", step.rotary, step.slots, *cache, step.heads.q, scales)
        assert same_bits(found, q)
    for cached, full, scale in zip(zip(codes, rounded, strict=True), plain, scales, strict=True):
        expected = quantize_fp8_activation(full[step.slots], scale)
        assert bool((expected.float().abs() == 448).any())
        assert same_bits(cached[0][step.slots], expected)
        assert same_bits(cached[1][step.slots], (expected.float() * scale).bfloat16())


def test_strided_rows_and_caches_and_int32_slots():
    step = Step(SHAPES["4 of 2"], 5)
    expected = step.fused("rms")
    wide = torch.cat([step.qkv, step.qkv], dim=-1)
    step.qkv, width = wide[:, : step.qkv.shape[1]], step.heads.kv * step.heads.dim
    both = torch.full((SLOTS, 2, step.heads.kv, step.heads.dim), 77.0, dtype=torch.bfloat16, device=DEVICE)
    keys, values = both[:, 0], both[:, 1]
    assert keys.stride(0) == 2 * width
    q = norm_rope_write(
        step.qkv, step.norms, EPS, "rms", step.rotary, step.slots.int(), keys, values, step.heads.q
    )  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip((q, keys, values), expected, strict=True))


def test_a_token_does_not_depend_on_the_others():
    step = Step(SHAPES["6 of 3, odd size"], 5)
    whole = step.fused("rms")[0]
    step.qkv, step.slots, step.rotary = step.qkv[2:3], step.slots[2:3], tuple(part[2:3] for part in step.rotary)
    assert same_bits(step.fused("rms")[0], whole[2:3])


def test_no_tokens():
    step = Step(SHAPES["4 of 2"], 0)
    assert step.fused("rms")[0].shape == (0, 4, 32)
