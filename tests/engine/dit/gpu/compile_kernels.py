"""Compiles the kernels between linears of a diffusion transformer ahead of time and prints what each needs, as JSON
(`ahead_of_time.run`); arguments: architectures, as 90."""

from __future__ import annotations

import json
import re
import sys

from ahead_of_time import Kernel, compile_for, needs

from rollmill.engine.dit.gpu import gelu, modulate, qk_rope

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


def kernels() -> dict[str, Kernel]:
    """Name -> kernel, signature, constants, warps: the shapes of FLUX.1."""
    return {
        "add_norm_modulate fp8": (modulate._modulate_kernel, MODULATE, {**NORM, **QUANTIZE}, 8),
        "add_norm_modulate bf16": (modulate._modulate_kernel, MODULATE, {**NORM, **KEEP}, 8),
        "join_gelu fp8": (gelu._gelu_kernel, GELU, {**QUANTIZE, **TILES}, 8),
        "join_gelu bf16": (gelu._gelu_kernel, GELU, {**KEEP, **TILES}, 8),
        "qk_norm_rope": (qk_rope._qk_rope_kernel, ROPE, {**HEADS, "CODES": False}, 4),
        "qk_norm_rope fp8": (qk_rope._qk_rope_kernel, {**ROPE, "out_ptr": FP8}, {**HEADS, "CODES": True}, 4),
        "v codes": (qk_rope._v_kernel, VALUES, {"TILE": 128, "COLS": 128}, qk_rope.V_WARPS),
    }


def compile_one(sm: int, kernel: Kernel) -> dict[str, int]:
    """What it needs, and how many loads are of 16 bytes a thread."""
    compiled = compile_for(sm, kernel, SIXTEENS)
    return needs(compiled) | {"wide": len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]))}


if __name__ == "__main__":
    sms = [int(sm) for sm in sys.argv[1:]]
    print(json.dumps({f"{name} sm{sm}": compile_one(sm, kernel) for sm in sms for name, kernel in kernels().items()}))
