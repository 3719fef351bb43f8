"""Compiles every kernel ahead of time, without a GPU, and prints what each needs, as JSON: run in a process of its own
(the interpreter's switch must be off).

    python compile_kernels.py 90 100 103 120
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rollmill.moe.gpu import pack
from rollmill.quant.gpu import convert, quantize, word_sums

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
QUANTIZE = {"x_ptr": "*bf16", "static_ptr": "*fp32", "codes_ptr": "*i32", "scales_ptr": "*u8", "token_ptr": "*fp32"}
CONVERT = {"w_ptr": "*bf16", "codes_ptr": "*i32", "scales_ptr": "*u8", "global_ptr": "*fp32"}
STATE = {
    "ticket_ptr": "*i32",
    "amax_ptr": "*i32",
    "count_ptr": "*i32",
    "num_rows": "i32",
    "K": "i32",
    "code_max": "fp32",
}
ROWS = {"num_rows": "i32", "K": "i32"}
TILES = {"ROWS": 16, "STEP": 2, "BLOCK_K": 2048, "PROGRAMS": 96, "ONE_LAUNCH": True}


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Name -> kernel, signature, constants, warps: the shapes of Qwen3-30B-A3B's experts."""
    fp8 = {**QUANTIZE, "codes_ptr": "*fp8e4nv"}
    del fp8["scales_ptr"]
    weight = {**CONVERT, "codes_ptr": "*fp8e4nv"}
    del weight["scales_ptr"]
    layout = {"LAYOUT": 128, "SHUFFLED": True, "GATED": True}
    return {
        "quantize_nvfp4": (
            quantize._nvfp4_kernel,
            QUANTIZE | ROWS,
            {"ROWS": 1, "BLOCK_K": 2048, "LAYOUT": 128, "STATIC": False},
            2,
        ),
        "quantize_fp8": (quantize._fp8_kernel, fp8 | ROWS, {"ROWS": 1, "BLOCK_K": 2048, "STATIC": False}, 4),
        "convert_nvfp4": (convert._nvfp4_kernel, CONVERT | STATE | {"scale_stride": "i32"}, TILES | layout, 8),
        "word_sums": (
            word_sums.word_sums_kernel,
            {"words_ptr": "*i64", "multipliers_ptr": "*i64", "sums_ptr": "*i64", "num_words": "i32"},
            {"ROW": 2048},
            4,
        ),
        "pack_nvfp4": (
            pack.pack_nvfp4_kernel,
            {"codes_ptr": "*u8", "scales_ptr": "*u8", "weight_ptr": "*i16", "block_scale_ptr": "*u8"}
            | {"all_rows": "i32", "num_rows": "i32", "K": "i32"},
            {"ROWS": pack.ROWS, "WORDS": 512, "GROUPS": 128},
            4,
        ),
        "convert_fp8": (convert._fp8_kernel, weight | STATE, TILES | {"PER_ROW": False}, 8),
    }


def compile_one(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, sm: int
) -> dict[str, Any]:
    whole = signature | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(whole.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature=whole, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [str(BINARIES / "cuobjdump"), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"shared": compiled.metadata.shared, "ptx_has_wgmma": "wgmma" in compiled.asm["ptx"], **found}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name} sm{sm}": compile_one(*parts, sm)
                for sm in map(int, sys.argv[1:])
                for name, parts in kernels().items()
            }
        )
    )
