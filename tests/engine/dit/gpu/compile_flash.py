"""Compiles FP8 attention ahead of time for Hopper and prints what it needs, as JSON (`ahead_of_time.run`)."""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from ahead_of_time import check_packing, disassembled, needs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from rollmill.engine.dit.gpu import flash_fp8

INSTRUCTIONS = (
    "QGMMA.64x128x32",
    "QGMMA.64x8x32",
    "0x38383838",
    "WARPGROUP.DEPBAR",
    "MUFU",
    "F2FP",
    "USETMAXREG",
    "LDL",
    "STL",
)


def blocks(rows: int, cols: int) -> str:
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], gl.float8e4nv)
    return f"tensordesc<fp8e4nv[{rows}, {cols}],{layout!r}>"


def compile_flash() -> Any:
    signature = {"q_desc": blocks(64, 128), "k_desc": blocks(128, 128), "v_desc": blocks(128, 128)}
    signature |= {"out_ptr": "*bf16", "qk_scales_ptr": "*fp32", "v_scales_ptr": "*fp32"}
    signature |= {"tokens": "i32", "num_heads": "i32", "factor": "fp32"}
    constants = {"TILES": 128, **flash_fp8.OPTIONS}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    whole = signature | dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(flash_fp8._flash_kernel, signature=whole, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=flash_fp8.LAUNCH)


if __name__ == "__main__":
    compiled = compile_flash()
    check_packing(compiled)
    sass = disassembled(compiled, "nvdisasm", "-c")
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", sass)) for name in INSTRUCTIONS}
    print(json.dumps(needs(compiled) | counts))
