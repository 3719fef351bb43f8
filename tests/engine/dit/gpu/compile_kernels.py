"""Compiles the kernels between linears of a diffusion transformer ahead of time, without a GPU, and prints what each
needs, as JSON: run in a process of its own (the interpreter's switch must be off).

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

from rollmill.engine.dit.gpu import gelu, modulate, qk_rope

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BF16, FP32, FP8, WORDS = "*bf16", "*fp32", "*fp8e4nv", "*i32"
# multiples of 16, as Triton finds them
SIXTEENS = ("K", "width", "inner", "text", "image", "gate_stride", "stride", "head_dim")
ROWS = dict.fromkeys(("batch", "text", "image", "num_rows"), "i32")
OUT = {"out_ptr": BF16, "codes_ptr": FP8, "token_ptr": FP32}
MODULATE = {
    **{f"{name}_ptr": BF16 for name in ("x", "y", "gate", "scale", "shift")},
    **OUT,
    **ROWS,
    **dict.fromkeys(("K", "gate_stride", "stride"), "i32"),
    **dict.fromkeys(("share", "eps"), "fp32"),
}
GELU = {"attention_ptr": BF16, "mlp_ptr": BF16, **OUT, **ROWS, "width": "i32", "inner": "i32"}
del GELU["num_rows"]
TILES = {"LEFT": 4096, "FIRST": 8192, "SECOND": 4096, "ASSEMBLY": True}
ROPE = {
    **{f"{name}_ptr": WORDS for name in ("qkv", "out")},
    "scales_ptr": FP32,
    **{f"{name}_ptr": WORDS for name in ("text_q", "text_k", "image_q", "image_k")},
    **dict.fromkeys(("cos_ptr", "sin_ptr"), FP32),
    **dict.fromkeys(("batch", "text", "image", "num_heads"), "i32"),
    **dict.fromkeys(("share", "eps", "factor"), "fp32"),
    "num_rows": "i32",
}
HEADS = {"PAIRS": 64, "ROWS": qk_rope.ROWS, "HEADS": qk_rope.HEADS, "COLS": 64}
VALUES = {"v_ptr": BF16, "codes_ptr": FP8, "scales_ptr": FP32}
VALUES |= dict.fromkeys(("batch", "text", "image", "num_heads", "stride", "head_dim"), "i32")
QUANTIZE, KEEP = {"KEEP": False, "QUANTIZE": True}, {"KEEP": True, "QUANTIZE": False}

NORM = {"ADD": True, "NORM": True, "BLOCK_K": 4096}


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Name -> kernel, signature, constants, warps: the shapes of FLUX.1."""
    return {
        "add_norm_modulate fp8": (modulate._modulate_kernel, MODULATE, {**NORM, **QUANTIZE}, 8),
        "add_norm_modulate bf16": (modulate._modulate_kernel, MODULATE, {**NORM, **KEEP}, 8),
        "join_gelu fp8": (gelu._gelu_kernel, GELU, {**QUANTIZE, **TILES}, 16),
        "join_gelu bf16": (gelu._gelu_kernel, GELU, {**KEEP, **TILES}, 16),
        "qk_norm_rope": (qk_rope._qk_rope_kernel, ROPE, {**HEADS, "CODES": False}, 4),
        "qk_norm_rope fp8": (qk_rope._qk_rope_kernel, {**ROPE, "out_ptr": "*i16"}, {**HEADS, "CODES": True}, 4),
        "v codes": (qk_rope._v_kernel, VALUES, {"TILE": 128, "COLS": 128}, qk_rope.V_WARPS),
    }


def compile_one(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, sm: int
) -> dict[str, Any]:
    whole = signature | dict.fromkeys(constants, "constexpr")
    multiples = [kind.startswith("*") or name in SIXTEENS for name, kind in whole.items()]
    aligned = {(i,): [["tt.divisibility", 16]] for i, multiple in enumerate(multiples) if multiple}
    source = ASTSource(kernel, signature=whole, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [str(BINARIES / "cuobjdump"), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    found["wide"] = len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
    return {"shared": compiled.metadata.shared, **found}


if __name__ == "__main__":
    sms = [int(sm) for sm in sys.argv[1:]]
    print(json.dumps({f"{name} sm{sm}": compile_one(*parts, sm) for sm in sms for name, parts in kernels().items()}))
