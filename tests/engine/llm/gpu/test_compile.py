"""The fused kernels of a decoding step compile ahead of time for Hopper and Blackwell, without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).parent / "compile_kernels.py"
SHARED = {90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
KERNELS = 22
STACK = {"attention of parts of a token": 32}  # bytes that the assembler gives for a third program at a time


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, SHARED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("sm", SHARED)
def test_every_kernel_compiles_without_spills(compiled: dict[str, dict[str, Any]], sm: int):
    found = {name: needs for name, needs in compiled.items() if name.endswith(f" sm{sm}")}
    assert len(found) == KERNELS
    for name, needs in found.items():
        assert needs["LOCAL"] == 0, name
        assert needs["STACK"] <= STACK.get(name.removesuffix(f" sm{sm}"), 0), name
        assert needs["REG"] <= 255, name
        assert needs["shared"] <= SHARED[sm], name
