"""Dense linears on a GPU: FP8, NVFP4 W4A16 and the twin of W4A4, in a CUDA graph, weights not in the L2.

    python benchmarks/gpu_dense.py [--sweep]

A figure is the geometric mean over the shapes; the note has them one by one. Limit: the bytes of the packed weight and
of both activations at the rate of a copy, or the multiplications at the GPU's measured peak, whichever takes longer.
`fp8_product` starts from codes, as its peers do; `fp8_one_road` takes the kernel of few tokens for any number of them,
so that a row has the same bits in any batch.
`--sweep` times tiles, to fill the kernels' tables.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from importlib.util import find_spec
from unittest.mock import patch

import torch
from gpu_quantize import copy_rate, graphed
from record import Result, make_result, save
from torch import Tensor

from rollmill.quant import FP8, NVFP4, FP8Rows, Scheme, WeightShape, find_capability, select_kernel
from rollmill.quant.gpu import nvfp4_gemm
from rollmill.quant.gpu.fp8_gemm import few_tokens
from rollmill.quant.gpu.nvfp4_gemm import Tile
from rollmill.quant.gpu.quantize import nvfp4_products, quantize_fp8
from rollmill.quant.kernels.triton_fp8 import TritonFP8Kernel

SHAPES = {  # rows of the weight, columns
    "30B-A3B qkv": (5120, 2048),
    "30B-A3B o": (2048, 4096),
    "FLUX 3072": (3072, 3072),
    "FLUX up": (12288, 3072),
    "FLUX qkv": (9216, 3072),
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate up": (28672, 4096),
    "8B down": (4096, 14336),
}
SCHEMES: dict[str, tuple[str, Scheme]] = {  # name -> kernel, scheme
    "fp8": ("triton_fp8", FP8(per_channel=True)),
    "nvfp4": ("triton_nvfp4", NVFP4(activation="none")),
    "nvfp4_twin": ("triton_nvfp4", NVFP4()),
    "nvfp4_exact": ("exact", NVFP4(activation="none")),
}
PEAK = {"fp8": 1347e12, "nvfp4": 733e12}  # measured on this GPU: `_scaled_mm` and BF16 products of 8192^3
BATCHES = (1, 16, 64, 256, 1024, 4096, 16384)
PEERS = {"_scaled_mm": "torch._scaled_mm", "sgl_kernel": "sgl_kernel.fp8_scaled_mm"}
L2 = 120e6  # bytes of copies that are read in turn


class Layer:
    """One linear, as often as it takes to leave the L2."""

    def __init__(self, kernel: str, scheme: Scheme, shape: tuple[int, int]) -> None:
        weight = WeightShape((shape[0],), shape[1])
        capability = find_capability("cuda")
        found = select_kernel(scheme, weight, capability, torch.bfloat16, kernel)
        self.kernel, self.scheme, self.shape = found(scheme, weight, torch.bfloat16, capability), scheme, shape
        stored = scheme.quantize((torch.randn(shape, device="cuda") * 0.03).bfloat16(), weight)
        packed = self.kernel.prepare({k: stored[k] for k in scheme.matrices(weight)})
        packed |= self.kernel.derive({k: stored[k] for k in scheme.scales(weight)})
        self.bytes = sum(t.nbytes for t in packed.values())
        copies = 1 + math.ceil(L2 / self.bytes)
        self.copies = [{key: value.clone() for key, value in packed.items()} for _ in range(copies)]

    def micros(self, x: Tensor, repeats: int = 9) -> float:
        def call(packed: dict[str, Tensor]) -> Callable[[], object]:
            return lambda: self.kernel.apply(x, packed)

        return graphed([call(packed) for packed in self.copies], repeats) * 1e6

    def limit(self, tokens: int, copy: float, peak: float) -> float:
        rows, cols = self.shape
        moved = self.bytes + 2 * tokens * (rows + cols)
        return max(moved / copy, 2 * tokens * rows * cols / peak) * 1e6


def tokens_of(count: int, cols: int) -> Tensor:
    return torch.randn(count, cols, device="cuda").bfloat16()


def bench() -> None:
    copy = copy_rate()
    print(f"copy {copy / 1e12:.3f} TB/s", flush=True)
    results: list[Result] = []
    for name, (kernel, scheme) in SCHEMES.items():
        found: dict[int, list[tuple[str, float, float]]] = {tokens: [] for tokens in BATCHES}
        for shape_name, shape in SHAPES.items():
            layer = Layer(kernel, scheme, shape)
            for tokens in BATCHES:
                micros = layer.micros(tokens_of(tokens, shape[1]))
                found[tokens].append((shape_name, micros, layer.limit(tokens, copy, PEAK[name.split("_")[0]])))
            del layer
            torch.cuda.empty_cache()
        for tokens, rows in found.items():
            each = ", ".join(f"{shape} {micros:.1f} ({limit / micros:.0%})" for shape, micros, limit in rows)
            value, limit = mean([micros for _, micros, _ in rows]), mean([limit for _, _, limit in rows])
            results.append(make_result(f"dense_{name}_m{tokens}_us", value, "us", limit=limit, note=each))
            print(results[-1].name, f"{value:.1f} us, limit {limit:.1f};", each, flush=True)
    save("gpu_dense", [*results, *parts()])


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def parts() -> list[Result]:
    """What the whole of a linear is made of: products alone, BF16's, the quantizers."""
    results = []
    for tokens in BATCHES:
        found: dict[str, list[float]] = {}
        for shape_name, shape in SHAPES.items():
            times = {key: graphed(calls, 9) * 1e6 for key, calls in part_calls(tokens, *shape).items()}
            print(shape_name, tokens, ", ".join(f"{key} {micros:.1f}" for key, micros in times.items()), flush=True)
            for key, micros in times.items():
                found.setdefault(key, []).append(micros)
        results += part_results(tokens, found)
    return results


def part_results(tokens: int, found: dict[str, list[float]]) -> list[Result]:
    """Geometric means over the shapes; `fp8_product` beside every peer that is there."""
    notes = {
        key: ", ".join(f"{shape} {micros:.1f}" for shape, micros in zip(SHAPES, each, strict=True))
        for key, each in found.items()
    }
    ours = mean(found["fp8_product"])
    results = [
        make_result(f"dense_fp8_product_m{tokens}_{key.strip('_')}_us", ours, "us", peer=mean(found[key]),
                    peer_name=peer, note=f"{notes['fp8_product']}; peer: {notes[key]}")
        for key, peer in PEERS.items() if key in found
    ]  # fmt: skip
    for key in ("fp8_one_road", "bf16", "quantize_fp8", "quantize_nvfp4"):
        if key in found:
            results.append(make_result(f"dense_{key}_m{tokens}_us", mean(found[key]), "us", note=notes[key]))
    return results


def part_calls(tokens: int, rows: int, cols: int) -> dict[str, list[Callable[[], object]]]:
    x, w = tokens_of(tokens, cols), tokens_of(rows, cols)
    codes, scale = quantize_fp8(x)
    weights, row_scale = copies_of(w.to(torch.float8_e4m3fn)), torch.ones(1, rows, device="cuda")
    kernel = fp8_kernel(rows, cols)

    def scaled_mm(w: Tensor) -> Tensor:
        scaled = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        return scaled(codes, w.t(), scale_a=scale[:, None], scale_b=row_scale, out_dtype=torch.bfloat16)

    def product(w: Tensor) -> Tensor:
        return kernel.multiply(FP8Rows(codes, scale), {"weight": w, "row_scale": row_scale})

    calls: dict[str, list[Callable[[], object]]] = {
        "fp8_product": [lambda w=w: product(w) for w in weights],
        "_scaled_mm": [lambda w=w: scaled_mm(w) for w in weights],
        "bf16": [lambda w=w: x @ w.t() for w in copies_of(w)],
        "quantize_fp8": [lambda: quantize_fp8(x)] * 8,
        "quantize_nvfp4": [lambda: nvfp4_products(x)] * 8,
        "fp8_one_road": [lambda w=w: few_tokens(codes, scale, w, row_scale[0], rows) for w in weights],
    }
    if find_spec("sgl_kernel"):
        from sgl_kernel import fp8_scaled_mm

        scales = scale[:, None], row_scale[0]
        calls["sgl_kernel"] = [lambda w=w: fp8_scaled_mm(codes, w.t(), *scales, torch.bfloat16) for w in weights]
    return calls


def fp8_kernel(rows: int, cols: int) -> TritonFP8Kernel:
    return TritonFP8Kernel(FP8(per_channel=True), WeightShape((rows,), cols), torch.bfloat16, find_capability("cuda"))


def copies_of(weight: Tensor) -> list[Tensor]:
    return [weight.clone() for _ in range(1 + math.ceil(L2 / weight.nbytes))]


def sweep() -> None:
    kernel, scheme = SCHEMES["nvfp4"]
    for shape_name, shape in SHAPES.items():
        layer = Layer(kernel, scheme, shape)
        for tokens, block in ((1, 8), (16, 16), (64, 32), (128, 32)):
            few = [Tile(rows, block, stages) for rows, stages in itertools.product((16, 32, 64), (2, 3, 4, 5))]
            try_tiles(layer, shape_name, tokens, "FEW_TILES", few)
        for tokens in (64, 128, 256, 1024, 4096):
            with patch.object(nvfp4_gemm, "FEW", 0):
                try_tiles(layer, shape_name, tokens, "MANY_TILES", MANY)
        del layer
        torch.cuda.empty_cache()


def try_tiles(layer: Layer, name: str, tokens: int, table: str, tiles: list[Tile]) -> None:
    """Prints the fastest; a tile must not change bits."""
    x, found, outs = tokens_of(tokens, layer.shape[1]), [], []
    for tile in tiles:
        with patch.object(nvfp4_gemm, table, ((1 << 31, tile),)):
            try:
                found.append((round(layer.micros(x), 2), tuple(tile)))
                outs.append(layer.kernel.apply(x, layer.copies[0]))
            except Exception as error:  # a tile that does not fit
                if "resource" not in str(error):
                    print("failed", tile, str(error)[:100], flush=True)
    assert all(torch.equal(out, outs[0]) for out in outs), "tiles change bits"
    print(name, tokens, table, sorted(found)[:5], "worst", max(found), flush=True)


MANY = [
    Tile(128, 128, 3, depth=64, warps=8),
    Tile(128, 128, 4, depth=64, warps=4),
    Tile(128, 256, 3, depth=64, warps=8),
    Tile(128, 64, 4, depth=64, warps=4),
    Tile(64, 64, 4, depth=64, warps=4),
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    sweep() if parser.parse_args().sweep else bench()
