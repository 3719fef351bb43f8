"""Dense linears on a GPU: FP8, NVFP4 W4A16 and the twin of W4A4, in a CUDA graph, weights not in the L2.

    python benchmarks/gpu_dense.py [--sweep] [--sgl-kernel common_ops.abi3.so]

A figure is the geometric mean over the shapes; the note has them one by one, with the share of the limit and, at few
tokens, the share when an empty launch is taken off the time. Limit: the bytes of the packed weight and of both
activations at the rate of a copy, or the multiplications at the GPU's measured peak, whichever takes longer.
`fp8_product` starts from codes, as its peers do: `_scaled_mm` with sums in float32 or in the tensor cores (`fast`), and
`sgl_kernel.fp8_scaled_mm`, which sums in the tensor cores, where the package is installed or its library named.
`fp8_one_road` takes the kernel of few tokens for any number of them, so that a row has the same bits in any batch.
`--sweep` times tiles, to fill the kernels' tables.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

import torch
import triton
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
PRODUCT_BATCHES = (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
ONE_ROAD = 1024  # tokens, at the most: longer says nothing new
FEW = 16  # tokens, at the most: where a launch counts
PEERS = {
    "scaled_mm": "torch._scaled_mm",
    "scaled_mm_fast": "torch._scaled_mm, fast sums",
    "sgl_kernel": "sgl_kernel.fp8_scaled_mm, fast sums",
}
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


def bench(sgl_kernel: str | None) -> None:
    copy, empty = copy_rate(), empty_launch()
    print(f"copy {copy / 1e12:.3f} TB/s, an empty launch {empty:.2f} us", flush=True)
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
            each = ", ".join(share_note(*row, empty if tokens <= FEW else 0) for row in rows)
            value, limit = mean([micros for _, micros, _ in rows]), mean([limit for _, _, limit in rows])
            results.append(make_result(f"dense_{name}_m{tokens}_us", value, "us", limit=limit, note=each))
            print(results[-1].name, f"{value:.1f} us, limit {limit:.1f};", each, flush=True)
        save("gpu_dense", results)  # what there is, should the rest not end
    save("gpu_dense", [*results, *parts(find_sgl_kernel(sgl_kernel))])


def share_note(shape: str, micros: float, limit: float, empty: float) -> str:
    alone = f", {limit / (micros - empty):.0%} beyond a launch" if empty else ""
    return f"{shape} {micros:.1f} ({limit / micros:.0%}{alone})"


@triton.jit
def empty_kernel(x_ptr):
    pass


def empty_launch() -> float:
    """Microseconds of a launch that does nothing, in a CUDA graph of many."""
    x = torch.zeros(1, device="cuda")
    return graphed([lambda: empty_kernel[(132,)](x)] * 64, 9) * 1e6


def find_sgl_kernel(path: str | None) -> Callable[..., Tensor] | None:
    """`fp8_scaled_mm` of the library at `path`, or of the installed package."""
    if path is not None:
        torch.ops.load_library(path)
    elif find_spec("sgl_kernel"):
        import_module("sgl_kernel")
    else:
        return None
    return torch.ops.sgl_kernel.fp8_scaled_mm.default


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def parts(sgl_kernel: Callable[..., Tensor] | None) -> list[Result]:
    """What the whole of a linear is made of: products alone, BF16's, the quantizers."""
    found: dict[int, dict[str, list[float]]] = {tokens: {} for tokens in PRODUCT_BATCHES}
    for shape_name, shape in SHAPES.items():
        layer = Parts(*shape, sgl_kernel)
        for tokens in PRODUCT_BATCHES:
            times = {key: graphed(calls, 9) * 1e6 for key, calls in layer.calls(tokens).items()}
            print(shape_name, tokens, ", ".join(f"{key} {micros:.1f}" for key, micros in times.items()), flush=True)
            for key, micros in times.items():
                found[tokens].setdefault(key, []).append(micros)
        del layer
        torch.cuda.empty_cache()
    return [result for tokens, times in found.items() for result in part_results(tokens, times)]


def part_results(tokens: int, found: dict[str, list[float]]) -> list[Result]:
    """Geometric means over the shapes; `fp8_product` beside every peer that is there, and beside the best for each."""
    ours = found["fp8_product"]
    peers = {key: (PEERS[key], found[key]) for key in PEERS if key in found}
    peers["best"] = "the best of them for each shape", [min(each) for each in zip(*map(found.get, peers), strict=True)]
    results = [
        make_result(f"dense_fp8_product_m{tokens}_{key}_us", mean(ours), "us", peer=mean(times), peer_name=peer,
                    note=f"{shape_notes(ours)}; peer: {shape_notes(times)}")
        for key, (peer, times) in peers.items()
    ]  # fmt: skip
    for key in ("fp8_one_road", "bf16", "quantize_fp8", "quantize_nvfp4"):
        if key in found:
            results.append(
                make_result(f"dense_{key}_m{tokens}_us", mean(found[key]), "us", note=shape_notes(found[key]))
            )
    return results


def shape_notes(times: list[float]) -> str:
    return ", ".join(f"{shape} {micros:.1f}" for shape, micros in zip(SHAPES, times, strict=True))


class Parts:
    """One linear's weight in FP8 and in BF16, as often as it takes to leave the L2."""

    def __init__(self, rows: int, cols: int, sgl_kernel: Callable[..., Tensor] | None) -> None:
        weight = tokens_of(rows, cols)
        self.cols, self.bf16, self.fp8 = cols, copies_of(weight), copies_of(weight.to(torch.float8_e4m3fn))
        self.row_scale, self.sgl_kernel = torch.ones(1, rows, device="cuda"), sgl_kernel
        shape, capability = WeightShape((rows,), cols), find_capability("cuda")
        self.kernel = TritonFP8Kernel(FP8(per_channel=True), shape, torch.bfloat16, capability)

    def calls(self, tokens: int) -> dict[str, list[Callable[[], object]]]:
        x = tokens_of(tokens, self.cols)
        rows = FP8Rows(*quantize_fp8(x))
        calls: dict[str, list[Callable[[], object]]] = {
            "fp8_product": self._each(lambda w: self.kernel.multiply(rows, {"weight": w, "row_scale": self.row_scale})),
            "scaled_mm": self._each(lambda w: self._scaled_mm(rows, w)),
            "scaled_mm_fast": self._each(lambda w: self._scaled_mm(rows, w, fast=True)),
        }
        if tokens in BATCHES:
            calls["bf16"] = [lambda w=w: x @ w.t() for w in self.bf16]
            calls["quantize_fp8"] = [lambda: quantize_fp8(x)] * 8
            calls["quantize_nvfp4"] = [lambda: nvfp4_products(x)] * 8
        if tokens in BATCHES and tokens <= ONE_ROAD:
            scale = self.row_scale[0]
            calls["fp8_one_road"] = self._each(lambda w: few_tokens(rows.codes, rows.scale, w, scale, len(w)))
        if (product := self.sgl_kernel) is not None:
            scales = rows.scale[:, None], self.row_scale[0]
            calls["sgl_kernel"] = self._each(lambda w: product(rows.codes, w.t(), *scales, torch.bfloat16, None))
        return calls

    def _each(self, product: Callable[[Tensor], Tensor]) -> list[Callable[[], object]]:
        return [lambda w=w: product(w) for w in self.fp8]

    def _scaled_mm(self, rows: FP8Rows, w: Tensor, *, fast: bool = False) -> Tensor:
        scales = {"scale_a": rows.scale[:, None], "scale_b": self.row_scale}
        multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        return multiply(rows.codes, w.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=fast)


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
        chosen = patch.object(nvfp4_gemm, "few_tile", lambda *_, tile=tile: tile)
        with chosen, patch.object(nvfp4_gemm, table, ((1 << 31, tile),)):
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
    parser.add_argument("--sgl-kernel", help="sgl_kernel's library of operators, where the package is not installed")
    options = parser.parse_args()
    sweep() if options.sweep else bench(options.sgl_kernel)
