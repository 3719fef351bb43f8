"""Compiles FP8 attention ahead of time for Hopper, without a GPU, and prints what it needs, as JSON: run in a process
of its own (the interpreter's switch must be off)."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from rollmill.engine.dit.gpu import flash_fp8

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("QGMMA.64x128x32", "WARPGROUP.DEPBAR", "MUFU", "F2FP", "USETMAXREG", "LDL", "STL")


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


def needs(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [str(BINARIES / tool), option, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", sass)) for name in INSTRUCTIONS}
    return {"shared": compiled.metadata.shared, **found, **counts}


if __name__ == "__main__":
    print(json.dumps(needs(compile_flash())))
