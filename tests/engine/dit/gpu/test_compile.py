"""The kernels between linears compile ahead of time for Hopper and Blackwell, without spills and with wide loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ahead_of_time import run

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT, FLASH = (Path(__file__).parent / f"compile_{name}.py" for name in ("kernels", "flash"))
ARCHITECTURES = (90, 100)
SHARED = 227 * 1024  # bytes a program may have
KERNELS = 7


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return run(SCRIPT, *ARCHITECTURES)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_every_kernel_compiles_without_spills(compiled: dict[str, dict[str, Any]], sm: int):
    found = {name: needs for name, needs in compiled.items() if name.endswith(f" sm{sm}")}
    assert len(found) == KERNELS
    for name, needs in found.items():
        assert needs["STACK"] == needs["LOCAL"] == 0, name
        assert needs["REG"] <= 128, name  # two programs of 512 threads, or more, on a multiprocessor
        assert needs["shared"] <= SHARED // 2, name
        assert needs["wide"] > 0, name  # loads of 16 bytes a thread


def test_fp8_attention_keeps_its_products_in_flight():
    """Two groups, each with a first tile of scores (4 products), a loop (4 of scores, 4 of values, 4 sums) and a last
    tile of values (4, and 4 sums). Products that the assembler runs one by one have a wait each. Ones fill words."""
    needs = run(FLASH)
    assert needs["STACK"] == needs["LOCAL"] == needs["LDL"] == needs["STL"] == 0
    assert needs["shared"] <= SHARED
    assert needs["QGMMA.64x128x32"] == 2 * 16
    assert needs["QGMMA.64x8x32"] == 2 * 8
    assert needs["0x38383838"] > 0
    assert needs["WARPGROUP.DEPBAR"] == 2 * 4
    assert needs["MUFU"] < 64  # no exponential an element: 64 of a tile are a thread's
    assert needs["USETMAXREG"] > 0
