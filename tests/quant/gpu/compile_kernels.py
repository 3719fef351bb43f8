"""Compiles every kernel ahead of time and prints what each needs, as JSON (`ahead_of_time.run`); arguments:
architectures, as 90."""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

from ahead_of_time import Kernel, compile_for, needs

from rollmill.moe.gpu import fp8_many, grouped_gemm, nvfp4_grouped, nvfp4_grouped_many
from rollmill.moe.runners.triton_tiles import BF16_TILES, FP8_TILES, NVFP4_TILES
from rollmill.quant.gpu import (
    bf16_gemm,
    convert,
    fp8_gemm,
    fp8_middle,
    nvfp4_gemm,
    nvfp4_middle,
    nvfp4_native,
    nvfp4_pack,
    quantize,
    word_sums,
)

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
MATMUL = {  # "i32:16": a multiple of 16, as launches find by themselves
    "x_ptr": "*bf16",
    "w_ptr": "*u8",
    "scale_ptr": "*u8",
    "row_scale_ptr": "*fp32",
    "token_scale_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "out_ptr": "*bf16",
    "M": "i32",
    "N": "i32:16",
    "K": "i32:16",
    "first_row": "i32:16",
    "end_row": "i32:16",
    "steps": "i32",
}
ROW = {"ROWS": 1, "BLOCK_K": 2048, "EARLY": True}
FEW = {"SLICES": 4, "ASSEMBLY": True}
END = {"SCALED": 1, "BIAS": True}
EPILOGUE = {"RAGGED": False} | END
TILES = {"ROWS": 16, "STEP": 2, "BLOCK_K": 2048, "PROGRAMS": 96, "ONE_LAUNCH": True}


def kernels() -> dict[str, Kernel]:
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
            ROW | {"LAYOUT": 128, "STATIC": 0},
            2,
        ),
        "quantize_fp8": (quantize._fp8_kernel, fp8 | ROWS, ROW | {"STATIC": 0, "REPEAT": 1}, 4),
        "convert_nvfp4": (convert._nvfp4_kernel, CONVERT | STATE | {"scale_stride": "i32"}, TILES | layout, 8),
        "word_sums": (
            word_sums.word_sums_kernel,
            {"table_ptr": "*i64", "multipliers_ptr": "*i64", "sums_ptr": "*i64"},
            {"STACKS": 16, "ROW": 2048},
            4,
        ),
        "convert_fp8": (convert._fp8_kernel, weight | STATE, TILES | {"PER_ROW": False}, 8),
    }


def dense_kernels() -> dict[str, Kernel]:
    """Every tile of the dense NVFP4 product, and what surrounds it. The assembly is any NVIDIA GPU's."""
    products = {"x_ptr": "*bf16", "static_ptr": "*fp32", "products_ptr": "*bf16", "token_ptr": "*fp32"} | ROWS
    decoded = {k: v for k, v in MATMUL.items() if k not in ("scale_ptr", "steps")} | {"w_ptr": "*bf16"}
    decode = {k: MATMUL[k] for k in ("w_ptr", "scale_ptr", "out_ptr", "N", "K", "first_row", "end_row")}
    pack_inputs = {"codes_ptr": "*u8", "scales_ptr": "*u8", "weight_ptr": "*i16", "block_scale_ptr": "*u8"}
    pack_inputs |= {"all_rows": "i32:16", "num_rows": "i32:16", "K": "i32:16", "steps": "i32"}
    few_options = FEW | EPILOGUE | {"EARLY": True}
    few = {
        f"nvfp4_few_{tile.tokens}": (nvfp4_gemm._few_tokens, MATMUL, few_options | tile_of(tile), 4)
        for _, tile in nvfp4_gemm.FEW_TILES
    }
    words = {k: "*i32" if k in ("w_ptr", "scale_ptr") else v for k, v in MATMUL.items() if k != "K"}
    middle = {
        f"nvfp4_middle_{tile.rows}x{tile.tokens}": (
            nvfp4_middle.middle_tokens,
            words,
            FEW | END | tile_of(tile),
            tile.warps,
        )
        for tile in nvfp4_gemm.MIDDLE_TILES
    }
    many = {
        f"nvfp4_many_{tile.tokens}": (
            nvfp4_gemm._many_tokens,
            decoded,
            EPILOGUE | tile_of(tile) | {"DEPTH": tile.depth, "GROUP": 8},
            tile.warps,
        )
        for _, tile in nvfp4_gemm.MANY_TILES
    }
    return {
        **few,
        **middle,
        **many,
        "nvfp4_pack": (nvfp4_pack.pack_kernel, pack_inputs, {"ROWS": nvfp4_pack.ROWS}, 4),
        "nvfp4_decode": (nvfp4_gemm._decode, decode, {"ROWS": 64, "ASSEMBLY": True}, 4),
        "nvfp4_products": (
            quantize._nvfp4_products_kernel,
            products,
            ROW | {"STATIC": 0, "REPEAT": 1},
            2,
        ),
    }


def fp8_few_kernels() -> dict[str, Kernel]:
    """Every tile of the dense FP8 product of few tokens."""
    codes = {"x_ptr": "*fp8e4nv", "token_scale_ptr": "*fp32", "w_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32"}
    rest = {"bias_ptr": "*bf16", "out_ptr": "*bf16", "M": "i32", "N": "i32:16", "K": "i32:16", "steps": "i32"}
    options = {"SLICES": fp8_gemm.SLICES, "RAGGED": False, "EACH": True, "BIAS": True, "EARLY": True}
    options |= {"FETCH": True}
    return {
        f"fp8_few_{most}": (
            fp8_gemm.few_tokens_kernel,
            codes | rest,
            tile_of(tile) | {"DEPTH": tile.depth} | options,
            fp8_gemm.SLICES,
        )
        for most, tile in fp8_gemm.TILES
    }


def fp8_middle_kernels() -> dict[str, Kernel]:
    """Every tile of the dense FP8 product of more tokens."""
    rest = {"bias_ptr": "*bf16", "out_ptr": "*bf16", "part_ptr": "*fp32", "count_ptr": "*i32"}
    rest |= {"M": "i32", "N": "i32:16", "steps": "i32"}
    found = {}
    for tile in fp8_middle.MIDDLE_TILES:
        x, w = (f"tensordesc<fp8e4nv[{size}, {tile.depth}]>" for size in (tile.tokens, tile.rows))
        scales = {"x": x, "token_scale_ptr": "*fp32", "w": w, "row_scale_ptr": "*fp32"}
        sizes = {"ROWS": tile.rows, "TOKENS": tile.tokens, "DEPTH": tile.depth, "STAGES": tile.stages}
        options = {"PARTS": tile.parts, "EACH": True, "BIAS": True, "EARLY": True}
        name = "fp8_middle_" + "_".join(map(str, tile))
        found[name] = (fp8_middle.middle_tokens_kernel, scales | rest, sizes | options, tile.warps)
    return found


def fp8_many_kernels() -> dict[str, Kernel]:
    """The experts' products of many tokens, of Qwen3-30B-A3B's shape."""

    def tiles(kind: str, *shape: int) -> str:
        return f"tensordesc<{kind}[{', '.join(map(str, shape))}]>"

    def sizes(tile: fp8_many.ManyTile, cols: int) -> dict[str, Any]:
        own = {"ROWS": tile.rows, "DEPTH": tile.depth, "STAGES": tile.stages, "TURNS": tile.turns}
        return {"K": cols, "TOKENS": tokens} | own

    tokens, gate_up, down = fp8_many.TOKENS, fp8_many.GATE_UP, fp8_many.DOWN
    scales, counts = {"x_scale_ptr": "*fp32"}, dict.fromkeys(("num_pairs", "num_blocks"), "i32")
    first = {"x_ptr": "*fp8e4nv", **scales, "w_map": tiles("fp8e4nv", gate_up.rows, gate_up.depth)}
    first |= {"row_scale_ptr": "*fp32", "out_map": tiles("bf16", tokens, gate_up.rows)}
    first |= {"sorted_ptr": "*i32", "expert_ptr": "*i32", **counts, "inner": "i32:16"}
    second = {"x_map": tiles("fp8e4nv", tokens, down.depth), **scales}
    second |= {"w_map": tiles("fp8e4nv", down.rows, down.depth), "row_scale_ptr": "*fp32"}
    second |= {
        "out_map": tiles("bf16", tokens, down.rows // 2),
        "expert_ptr": "*i32",
        "used_ptr": "*i32",
        "N": "i32:16",
    }
    return {
        "fp8_blocks_gate_up": (fp8_many.gate_up_blocks, first, sizes(gate_up, 2048) | {"TOP_K": 8}, gate_up.warps),
        "fp8_blocks_down": (fp8_many.down_blocks, second, sizes(down, 768), down.warps),
    }


def bf16_kernels() -> dict[str, Kernel]:
    """Every tile of the BF16 product in one order of sums."""
    inputs = {"x_ptr": "*bf16", "w_ptr": "*bf16", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    sizes, found = {"M": "i32", "N": "i32:16", "K": "i32:16", "part": "i32"}, {}
    for tile in (*(tile for _, tile in bf16_gemm.FEW_TILES), *bf16_gemm.MANY_TILES):
        few = tile not in bf16_gemm.MANY_TILES
        kernel = bf16_gemm.few_tokens_kernel if few else bf16_gemm.many_tokens_kernel
        own = {"SLICES": bf16_gemm.SLICES} if few else {"GROUP": 8}
        options = {"DEPTH": tile.depth, "RAGGED": False, "BIAS": True, "EARLY": True} | own
        name = f"bf16_{'few' if few else 'many'}_{tile.rows}x{tile.tokens}"
        found[name] = (kernel, inputs | sizes, tile_of(tile) | options, tile.warps)
    return found


def tile_of(tile: nvfp4_gemm.Tile | fp8_gemm.Tile | bf16_gemm.Tile) -> dict[str, int]:
    return {"ROWS": tile.rows, "TOKENS": tile.tokens, "STAGES": tile.stages}


def expert_kernels() -> dict[str, Kernel]:
    """Every tile of the experts' products."""
    fp8, found = {"x_ptr": "*fp8e4nv", "x_scale_ptr": "*fp32", "w_ptr": "*fp8e4nv"}, {}
    nvfp4 = {"x_ptr": "*bf16", "x_scale_ptr": "*fp32", "w_ptr": "*u8", "scale_ptr": "*u8"}
    rest = {"row_scale_ptr": "*fp32", "out_ptr": "*bf16", "sorted_ptr": "*i32", "expert_ptr": "*i32"}
    rest |= {"num_pairs": "i32", "K": "i32:16"}
    bf16 = {"x_ptr": "*bf16", "x_scale_ptr": "*bf16", "w_ptr": "*bf16"}
    for name, inputs, table, more in (
        ("bf16", bf16, BF16_TILES, {"SCALED": False, "SORTED": True, "EARLY": True}),
        ("fp8", fp8, FP8_TILES, {"SCALED": True, "SORTED": True, "EARLY": True}),
        ("nvfp4", nvfp4, NVFP4_TILES, {"SCALED": True, "SORTED": True, "EARLY": True, "ASSEMBLY": True}),
    ):
        for (weight, size, top_k), at in itertools.product((("w13", "inner", {"TOP_K": 8}), ("w2", "N", {})), range(6)):
            if at >= len(table[weight]):
                continue
            most, tile = table[weight][at]
            own, reads = {"DEPTH": tile.depth}, inputs
            module: Any = grouped_gemm
            if name == "nvfp4" and tile.takes_large_instruction:
                module, own, reads = nvfp4_grouped_many, {}, inputs | {"w_ptr": "*i32", "scale_ptr": "*i32"}
            elif name == "nvfp4":
                module, own = nvfp4_grouped, {"WORDS": tile.rows < 32 * tile.warps}
                reads = inputs | ({"scale_ptr": "*i32"} if own["WORDS"] else {})
            kernel = module.grouped_gate_up if weight == "w13" else module.grouped_down
            sizes = {"ROWS": tile.rows, "TOKENS": tile.tokens, "STAGES": tile.stages} | own | top_k | more
            found[f"experts_{name}_{weight}_{most}"] = (kernel, reads | rest | {size: "i32:16"}, sizes, tile.warps)
    return found


def native_kernel(sm: int) -> Kernel:
    """NVFP4 x NVFP4 on tensor cores that multiply it themselves."""
    stored = {"x_ptr": "*u8", "x_scale_ptr": "*fp8e4nv", "w_ptr": "*u8", "w_scale_ptr": "*fp8e4nv"}
    rest = {"row_scale_ptr": "*fp32", "token_scale_ptr": "*fp32", "out_ptr": "*bf16"}
    sizes = {"M": "i32", "N": "i32:16", "K": "i32:16"}
    tile = {"NATIVE": True} | (nvfp4_native.SM120_TILE if sm == 120 else nvfp4_native.TILE)
    warps = tile.pop("num_warps")
    return nvfp4_native.native_product, stored | rest | sizes, tile, warps


def compile_one(sm: int, kernel: Kernel) -> dict[str, Any]:
    """What it needs, columns of tensor memory too, and with what it multiplies."""
    compiled = compile_for(sm, kernel)
    instructions = ("wgmma", "mma.sync", "tcgen05.mma", "kind::mxf4nvf4")
    found = [name for name in instructions if name in compiled.asm["ptx"]]
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    return {"instructions": found, "tensor_memory": tensor_memory, **needs(compiled)}


if __name__ == "__main__":
    asked = [(name, parts, int(sm)) for sm in sys.argv[1:] for name, parts in kernels().items()]
    fp8 = (fp8_few_kernels(), fp8_middle_kernels(), fp8_many_kernels())
    for found in (dense_kernels(), *fp8, bf16_kernels(), expert_kernels()):
        asked += [(name, parts, 90) for name, parts in found.items()]
    asked += [(name, parts, 100) for name, parts in expert_kernels().items() if "_bf16_" in name]
    asked += [("nvfp4_native", native_kernel(int(sm)), int(sm)) for sm in sys.argv[1:] if int(sm) >= 100]
    print(json.dumps({f"{name} sm{sm}": compile_one(sm, parts) for name, parts, sm in asked}))
