"""The fused kernels of a decoding step compile ahead of time for Hopper and Blackwell, without spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ahead_of_time import run

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).parent / "compile_kernels.py"
SHARED = {90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
KERNELS = 22
STACK = {"attention of parts of a token": 32}  # bytes that the assembler gives for a third program at a time


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return run(SCRIPT, *SHARED)


@pytest.mark.parametrize("sm", SHARED)
def test_every_kernel_compiles_without_spills(compiled: dict[str, dict[str, Any]], sm: int):
    found = {name: needs for name, needs in compiled.items() if name.endswith(f" sm{sm}")}
    assert len(found) == KERNELS
    for name, needs in found.items():
        assert needs["LOCAL"] == 0, name
        assert needs["STACK"] <= STACK.get(name.removesuffix(f" sm{sm}"), 0), name
        assert needs["REG"] <= 255, name
        assert needs["shared"] <= SHARED[sm], name
