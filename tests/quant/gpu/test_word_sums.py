"""Word sums against Python's own integers, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.quant.gpu.word_sums import word_sums  # noqa: E402 (after the conftest's set-up)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK = (1 << 64) - 1


def mix(index: int) -> int:
    """splitmix64 with arithmetic shifts, made odd."""
    x = index * 0x9E3779B97F4A7C15 & MASK
    x = (x ^ ((x - (1 << 64) if x >> 63 else x) >> 30)) & MASK
    x = x * 0xBF58476D1CE4E5B9 & MASK
    return ((x ^ ((x - (1 << 64) if x >> 63 else x) >> 27)) & MASK) | 1


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200])
def test_the_documented_sum(size: int):
    generator = torch.Generator().manual_seed(size)
    words = torch.randint(-(2**63), 2**63 - 1, (3, size), generator=generator)
    multipliers = torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator)
    factors = multipliers.tolist()
    expected = [
        sum(word * factors[i % 64] * mix(i // 64 + 1) for i, word in enumerate(unit)) & MASK for unit in words.tolist()
    ]
    sums = word_sums(words.to(DEVICE), multipliers.to(DEVICE)).tolist()
    assert [value & MASK for value in sums] == expected
