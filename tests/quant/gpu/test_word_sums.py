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


def expected_sum(unit: bytes, factors: list[int], constant: int) -> int:
    words = [int.from_bytes(unit[i : i + 8], "little") for i in range(0, len(unit), 8)]
    return (sum(w * factors[i % 64] * mix(i // 64 + 1) for i, w in enumerate(words)) + constant) & MASK


def check(stacks: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(len(stacks))
    multipliers = torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator)
    constants = [7 * i - 3 for i in range(len(stacks))]
    found = word_sums([stack.to(DEVICE) for stack in stacks], multipliers.to(DEVICE), constants)
    for stack, sums, constant in zip(stacks, found, constants, strict=True):
        units = [unit.numpy().tobytes() for unit in stack]
        assert [value & MASK for value in sums.tolist()] == [
            expected_sum(unit, multipliers.tolist(), constant) for unit in units
        ]


@pytest.mark.parametrize("halves", [1, 2, 3, 126, 128, 129, 131, 400])
def test_the_documented_sum(halves: int):
    """Odd numbers of halves: every other unit begins beside an address of 8."""
    generator = torch.Generator().manual_seed(halves)
    check([torch.randint(0, 256, (3, 4 * halves), dtype=torch.uint8, generator=generator)])


@pytest.mark.parametrize("count", [2, 3, 8, 17])
def test_many_stacks_in_one_launch(count: int):
    generator = torch.Generator().manual_seed(count)
    shapes = [(1 + i % 5, 4 * (1 + i * 37 % 211)) for i in range(count)]
    check([torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes])
