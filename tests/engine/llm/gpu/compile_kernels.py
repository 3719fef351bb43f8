"""Compiles the fused kernels of a decoding step ahead of time and prints what each needs, as JSON
(`ahead_of_time.run`); arguments: architectures, as 90."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

from ahead_of_time import Kernel, compile_for, needs

from rollmill.engine.llm.gpu import fixed_attention, norms, paged_kernels, qkv, sampling, silu
from rollmill.moe.gpu import blocks, router, routing

BF16, FP32, F64, FP8, I32, I64, U8 = "*bf16", "*fp32", "*fp64", "*fp8e4nv", "*i32", "*i64", "*u8"
# multiples of 16, as Triton finds them
SIXTEENS = ("K", "stride", "qkv_stride", "key_stride", "value_stride", "num_experts")
SIZES = {"num_rows": "i32", "K": "i32"}
TOKEN = {"token_ptr": FP32}
NORM = {
    **{f"{name}_ptr": BF16 for name in ("x", "y", "weight")},
    "place_ptr": I32,
    **dict.fromkeys(("choice_ptr", "static_ptr"), FP32),
    **{f"{name}_ptr": BF16 for name in ("sum", "out")},
    "codes_ptr": FP8,
    **TOKEN,
    **SIZES,
    "share": "fp32",
    "eps": "fp32",
}
QKV = {
    **{f"{name}_ptr": BF16 for name in ("qkv", "q_weight", "k_weight", "cos", "sin")},
    "slots_ptr": I64,
    **{f"{name}_ptr": BF16 for name in ("q", "keys", "values")},
    **dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), FP32),
    "eps": "fp32",
    **dict.fromkeys(("qkv_stride", "key_stride", "value_stride"), "i32"),
}
ROUTE = {"logits_ptr": BF16, "ids_ptr": I64, "weights_ptr": FP32, "num_experts": "i32", "scaling": "fp32"}
ROUTER = {
    **{f"{name}_ptr": BF16 for name in ("x", "w", "logits")},
    **dict.fromkeys(("M", "num_experts", "K", "steps"), "i32"),
}
BLOCKS = {
    "ids_ptr": I64,
    **dict.fromkeys(("counts_ptr", "pairs_ptr", "experts_ptr"), I32),
    **dict.fromkeys(("num_pairs", "num_blocks", "num_experts"), "i32"),
}
PARTS = {"sums_ptr": FP32, "peaks_ptr": FP32, "best_ptr": I32}
STRIDES = dict.fromkeys(("vocab", "stride", "num_parts"), "i32")
LOGITS = {"logits_ptr": BF16, "temperature_ptr": FP32}
CHOICE = {"uniform_ptr": F64, "given_ptr": I64}
DRAW = LOGITS | CHOICE | PARTS | {"ids_ptr": I64, "values_ptr": F64, "num_rows": "i32"} | STRIDES
DRAWN = {"BLOCK": 256, "PART": 16, "PARTS": 64}
ATTEND = {
    **{f"{name}_ptr": BF16 for name in ("q", "keys", "values", "out")},
    **{f"{name}_ptr": FP32 for name in ("peaks", "masses", "totals")},
    **{f"{name}_ptr": I32 for name in ("ended", "items", "sequences", "first_item", "tiles", "first_page", "pages")},
    **dict.fromkeys(("scale", "softcap"), "fp32"),
    **dict.fromkeys(("num_sequences", "stride", "window"), "i32"),
}
GATED = {"gate_up_ptr": BF16, "static_ptr": FP32}
EARLY = {"EARLY": True}
ROW = {"ROWS": 1, "BLOCK_K": 2048}  # Qwen3-30B-A3B's hidden size
WIDE = {"ROWS": 1, "BLOCK_K": 16384}  # the most of an intermediate size
LARGE = {"ROWS": 1, "BLOCK_K": 8192}  # the hidden size of a 70B model
NORM_OF = {
    "KIND": "rms",
    "ADD": True,
    "TOP_K": 0,
    "PLACED": False,
    "NORMED": True,
    "QUANTIZE": False,
    "STATIC": False,
} | EARLY
HEADS = {"NUM_HEADS": 32, "NUM_KV_HEADS": 4, "HEAD_DIM": 128, "ROTARY_DIM": 128, "COLS": 128, "HEADS": 4} | EARLY


def attention(kernel: Any, kind: Literal["prompt", "part", "whole"], head_dim: int = 128) -> tuple[Any, ...]:
    """Of 32 heads, 8 of a group."""
    shape = fixed_attention.SHAPE
    constants = {"HEADS": 32, "GROUP": 8, "D": head_dim, "COLS": head_dim, "PART": shape.part, "PAGE": 16} | EARLY
    constants |= {"WINDOW": False, "SOFTCAP": False, "STAGES": getattr(shape, f"{kind}_stages")}
    constants |= {"M": shape.prompt_rows if kind == "prompt" else 8}
    signature = {name: ATTEND[name] for name in kernel.arg_names if name in ATTEND}
    return kernel, signature, constants, shape.warps(kind, head_dim)


def kernels() -> dict[str, Kernel]:
    """Name -> kernel, signature, constants, warps."""
    quantized = NORM_OF | {"QUANTIZE": True}
    routed = {"TOP_K": 8, "CHOICES": 8, "RENORMALIZE": True, "SHORT": True} | EARLY
    partly = {"ROTARY_DIM": 64, "NORM": "none", "CACHE": "bf16"}
    fp8_cache = QKV | {"keys_ptr": FP8, "values_ptr": FP8}
    blocked = {"EXPERTS": 128, "CHUNK": 1024} | EARLY
    nvfp4 = GATED | {"codes_ptr": I32, "scales_ptr": U8} | TOKEN | SIZES
    fp8 = GATED | {"codes_ptr": FP8} | TOKEN | SIZES
    return {
        "attention of prompts": attention(paged_kernels.prompt_kernel, "prompt"),
        "attention of parts of a token": attention(paged_kernels.token_kernel, "part"),
        "attention of a token": attention(paged_kernels.token_kernel, "whole"),
        "attention of a token, large heads": attention(paged_kernels.token_kernel, "whole", 256),
        "add_rms_norm": (norms._norm_kernel, NORM, NORM_OF | ROW, 4),
        "add_rms_norm_quantize_fp8": (norms._norm_kernel, NORM, quantized | ROW, 4),
        "add_rms_norm_quantize_fp8 large": (norms._norm_kernel, NORM, quantized | LARGE, 16),
        "choices' sum and norm": (norms._norm_kernel, NORM, quantized | ROW | {"TOP_K": 8, "PLACED": True}, 8),
        "norm_rope_write": (qkv._qkv_kernel, QKV, HEADS | {"NORM": "rms", "CACHE": "bf16"}, 2),
        "norm_rope_write partly turned": (qkv._qkv_kernel, QKV, HEADS | partly, 2),
        "norm_rope_write fp8": (qkv._qkv_kernel, fp8_cache, HEADS | {"NORM": "rms", "CACHE": "fp8"}, 2),
        "router": (router.logits_kernel, ROUTER, router.TILE | EARLY | {"RAGGED": False}, router.TILE["SLICES"]),
        "route_softmax 128": (routing._softmax_kernel, ROUTE, routed | {"EXPERTS": 128}, 1),
        "route_softmax 512": (routing._softmax_kernel, ROUTE, routed | {"EXPERTS": 512, "SHORT": False}, 4),
        "sums of a vocabulary": (sampling._sum_kernel, LOGITS | PARTS | STRIDES, {"BLOCK": 256, "PART": 16}, 8),
        "draw": (sampling._draw_kernel, DRAW, DRAWN | {"GIVEN": False}, 4),
        "score": (sampling._draw_kernel, DRAW, DRAWN | {"GIVEN": True}, 4),
        "make_blocks 8": (blocks._one_program_kernel, BLOCKS, blocked | {"BLOCK": 16, "PAIRS": 128}, 4),
        "make_blocks 4096": (blocks._one_program_kernel, BLOCKS, blocked | {"BLOCK": 64, "PAIRS": 4096}, 16),
        "silu_and_mul": (
            silu._bf16_kernel,
            {"gate_up_ptr": BF16, "out_ptr": BF16} | SIZES,
            {"ROWS": 1, "COLS": 2048} | EARLY,
            4,
        ),
        "silu_and_mul_quantize_fp8": (silu._fp8_kernel, fp8, WIDE | EARLY | {"STATIC": False}, 16),
        "silu_and_mul_quantize_nvfp4": (silu._nvfp4_kernel, nvfp4, WIDE | EARLY | {"STATIC": False}, 16),
    }


if __name__ == "__main__":
    sms = [int(sm) for sm in sys.argv[1:]]
    asked = {f"{name} sm{sm}": (sm, kernel) for sm in sms for name, kernel in kernels().items()}
    print(json.dumps({name: needs(compile_for(*one, SIXTEENS)) for name, one in asked.items()}))
