"""Kernels compile ahead of time for Hopper and Blackwell, without spills and within shared memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ahead_of_time import run

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.quant.gpu import bf16_gemm, fp8_gemm, fp8_middle  # noqa: E402 (where Triton is installed)

SCRIPT = Path(__file__).parent / "compile_kernels.py"
ARCHITECTURES = (90, 100, 103, 120)
SHARED = {90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024, 120: 99 * 1024}  # bytes a program may have

TENSOR_MEMORY = 512  # columns


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return run(SCRIPT, *ARCHITECTURES)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["quantize_nvfp4", "quantize_fp8", "convert_nvfp4", "convert_fp8", "word_sums"])
def test_compiles_without_spills(compiled: dict[str, dict[str, Any]], kernel: str, sm: int):
    needs = compiled[f"{kernel} sm{sm}"]
    assert needs["STACK"] == needs["LOCAL"] == 0
    assert needs["REG"] <= 255
    assert needs["shared"] <= SHARED[sm]


@pytest.mark.parametrize(
    "kernel",
    [
        *(f"few_{tokens}" for tokens in (8, 16, 32)),
        *(f"middle_{tile}" for tile in ("64x32", "64x64", "128x64", "128x128")),
        *(f"many_{tokens}" for tokens in (64, 128, 256)),
        "decode",
        "products",
        "pack",
    ],
)
def test_dense_kernels_compile_for_hopper_without_spills(compiled: dict[str, dict[str, Any]], kernel: str):
    needs = compiled[f"nvfp4_{kernel} sm90"]
    assert needs["STACK"] == needs["LOCAL"] == 0
    assert needs["shared"] <= SHARED[90]
    wanted = {"few": ["mma.sync"], "middle": ["wgmma"], "many": ["wgmma"]}.get(kernel.split("_")[0], [])
    assert needs["instructions"] == wanted


def test_fp8_products_of_few_tokens_compile_for_hopper_without_spills(compiled: dict[str, dict[str, Any]]):
    found = {name: needs for name, needs in compiled.items() if name.startswith("fp8_few")}
    assert len(found) == len(fp8_gemm.TILES)
    for needs in found.values():
        assert needs["STACK"] == needs["LOCAL"] == 0
        assert needs["shared"] <= SHARED[90]
        assert needs["instructions"] == ["mma.sync"]


def test_fp8_products_of_more_tokens_compile_for_hopper_without_spills(compiled: dict[str, dict[str, Any]]):
    found = {name: needs for name, needs in compiled.items() if name.startswith("fp8_middle")}
    assert len(found) == len(fp8_middle.MIDDLE_TILES)
    for name, needs in found.items():
        assert needs["STACK"] == needs["LOCAL"] == 0, name
        assert needs["shared"] <= SHARED[90], name
        assert needs["instructions"] == ["wgmma"], name


@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_fp8_products_in_blocks_compile_for_hopper_without_spills(compiled: dict[str, dict[str, Any]], kernel: str):
    needs = compiled[f"fp8_blocks_{kernel} sm90"]
    assert needs["STACK"] == needs["LOCAL"] == 0
    assert needs["shared"] <= SHARED[90]
    assert needs["instructions"] == ["wgmma"]


@pytest.mark.parametrize(("kind", "instruction"), [("few", "mma.sync"), ("many", "wgmma")])
def test_bf16_products_in_one_order_compile_for_hopper_without_spills(
    compiled: dict[str, dict[str, Any]], kind: str, instruction: str
):
    found = {name: needs for name, needs in compiled.items() if name.startswith(f"bf16_{kind}_")}
    assert len(found) == len(bf16_gemm.FEW_TILES if kind == "few" else bf16_gemm.MANY_TILES)
    for needs in found.values():
        assert needs["STACK"] == needs["LOCAL"] == 0
        assert needs["shared"] <= SHARED[90]
        assert needs["instructions"] == [instruction]


@pytest.mark.parametrize("weight", ["w13", "w2"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "nvfp4"])
def test_experts_compile_for_hopper_without_spills(compiled: dict[str, dict[str, Any]], scheme: str, weight: str):
    tiles = {name: needs for name, needs in compiled.items() if name.startswith(f"experts_{scheme}_{weight}_")}
    found = {name: needs for name, needs in tiles.items() if name.endswith("sm90")}
    assert len(found) >= 4
    for name, needs in found.items():
        assert needs["STACK"] == needs["LOCAL"] == 0, name
        assert needs["shared"] <= SHARED[90], name
        assert needs["instructions"] in (["wgmma"], ["mma.sync"]), name


@pytest.mark.parametrize("weight", ["w13", "w2"])
def test_bf16_experts_compile_for_blackwell_too(compiled: dict[str, dict[str, Any]], weight: str):
    found = {name: needs for name, needs in compiled.items() if re.fullmatch(f"experts_bf16_{weight}_.* sm100", name)}
    assert len(found) >= 4
    for name, needs in found.items():
        assert needs["STACK"] == needs["LOCAL"] == 0, name
        assert needs["shared"] <= SHARED[100], name
        assert needs["tensor_memory"] <= TENSOR_MEMORY, name
        assert needs["instructions"] in (["tcgen05.mma"], ["mma.sync"]), name


@pytest.mark.parametrize(("sm", "instruction"), [(100, "tcgen05.mma"), (103, "tcgen05.mma"), (120, "mma.sync")])
def test_native_products_reach_the_nvfp4_instruction(compiled: dict[str, dict[str, Any]], sm: int, instruction: str):
    needs = compiled[f"nvfp4_native sm{sm}"]
    assert needs["instructions"] == [instruction, "kind::mxf4nvf4"]
    assert needs["STACK"] == needs["LOCAL"] == 0
    assert needs["shared"] <= SHARED[sm]
    assert needs["tensor_memory"] <= TENSOR_MEMORY
