"""Quantizers and weight conversion on a GPU: bit-equal to the reference first, then bytes a second, L2 cold.

    python benchmarks/gpu_quantize.py

Limit: the same bytes (read once, written once) at the rate at which this GPU copies 1 GiB. Small kernels are timed in a
CUDA graph over inputs that do not fit the L2 together.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence

import torch
from record import Result, make_result, save
from torch import Tensor

from rollmill.quant import FP8, NVFP4, WeightShape, numerics
from rollmill.quant.gpu.convert import RowOrder, convert_fp8, convert_nvfp4
from rollmill.quant.gpu.quantize import TILE_ROWS, quantize_fp8, quantize_nvfp4
from rollmill.quant.layout import gated_reorder_index, gather_rows, shuffle_rows_index, swizzle_scales

DEVICE = "cuda"
LAYERS, EXPERTS, HIDDEN, INNER = 48, 128, 2048, 768  # Qwen3-30B-A3B
ATTENTION = ((5120, 2048), (2048, 4096))  # q, k, v of one layer, and o


def main() -> None:
    torch.manual_seed(0)
    copy = copy_rate()
    print(f"copy {copy / 1e12:.3f} TB/s", flush=True)
    check_quantizers()
    check_conversion()
    results = [*bench_quantizers(copy), *bench_conversion(copy)]
    for result in results:
        print(result)
    save("gpu_quantize", results)


def equal(a: Tensor, b: Tensor) -> bool:
    as_bytes = [t.contiguous().view(torch.uint8) for t in (a, b)]
    return torch.equal(*as_bytes)


def copy_rate() -> float:
    """Bytes read and written a second, best of some copies of 1 GiB."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).fill_(i) for i in (1, 2))
    return 2 * source.numel() / min(times(lambda: target.copy_(source), 10))


def times(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of every repeat, by events."""
    call()
    spans = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        spans.append(start.elapsed_time(end) / 1e3)
    return spans


def graphed(calls: list[Callable[[], object]], repeats: int = 30) -> float:
    """Median seconds of one call, all of `calls` in one CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return statistics.median(times(graph.replay, repeats)) / len(calls)


def check_quantizers() -> None:
    for rows, cols in ((1, 16), (3, 2048), (257, 768), (33, 4096), (17, 5120), (5, 12288), (64, 48)):
        x = (torch.randn(rows, cols, device=DEVICE) * torch.exp(3 * torch.randn(rows, 1, device=DEVICE))).bfloat16()
        x[0, :16] = 0
        x[rows // 2] = 0
        for static in (None, torch.tensor(0.0123, device=DEVICE)):
            codes, scales, token = quantize_nvfp4(x, static)
            amax = x.abs().amax(-1, keepdim=True).float()
            encode = numerics.nvfp4_encode(amax) if static is None else static.reciprocal()
            values, block = numerics.quantize_nvfp4_activation(x, encode)
            assert equal(numerics.decode_e2m1(codes) + 0.0, values.flatten(-2) + 0.0), (rows, cols, static)
            assert equal(scales, block.to(torch.float8_e4m3fn)), (rows, cols, static)
            assert static is not None or equal(token, encode.reciprocal()[:, 0])
            for layout in ("128x4", "8x4"):
                assert equal(quantize_nvfp4(x, static, layout)[1], swizzle_scales(scales, TILE_ROWS[layout]))
            scale = numerics.decode_scale(amax, 448.0) if static is None else static
            got, got_scale = quantize_fp8(x, static)
            assert equal(got, numerics.quantize_fp8_activation(x, scale)), (rows, cols, static)
            assert static is not None or equal(got_scale, scale[:, 0])
    print("quantizers bit-equal to the reference", flush=True)


def check_conversion() -> None:
    for units, rows, cols in ((128, 1536, 2048), (5, 2048, 768), (1, 5120, 2048), (3, 256, 96), (2, 12288, 3072)):
        w = (torch.randn(units, rows, cols, device=DEVICE) * 0.02).bfloat16()
        w[0, 0] = 0
        shape = WeightShape((rows,), cols, units=units)
        stored = NVFP4().quantize(w, shape)
        buffers = nvfp4_buffers(w)
        addresses = [b.data_ptr() for b in buffers]
        for _ in range(2):
            poison(buffers)
            convert_nvfp4(w, *buffers)
            assert equal(buffers[0], stored["weight"]), (units, rows, cols)
            assert equal(buffers[1], stored["weight_scale"])
            assert equal(buffers[2], stored["weight_scale_2"][:, 0])
        assert addresses == [b.data_ptr() for b in buffers]
        if rows % 128 == 0:
            check_packed(w, stored)
        for scheme, scale in (
            (FP8(), torch.empty(units, device=DEVICE)),
            (FP8(per_channel=True), torch.empty(units, rows, device=DEVICE)),
        ):
            wanted = scheme.quantize(w, shape)
            codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
            poison([codes, scale])
            convert_fp8(w, codes, scale)
            assert equal(codes, wanted["weight"]), (scheme, units, rows, cols)
            assert equal(scale.flatten(), wanted["weight_scale"].flatten())
        del w, stored
    print("conversion bit-equal to the reference", flush=True)


def check_packed(w: Tensor, stored: dict[str, Tensor]) -> None:
    rows = w.shape[1]
    for gated in (False, True):
        index = shuffle_rows_index(rows)
        index = gated_reorder_index(rows)[index] if gated else index
        codes, _, scale_2 = nvfp4_buffers(w)
        swizzled = torch.empty(len(w), rows, -(-(w.shape[2] // 16) // 4) * 4, dtype=torch.float8_e4m3fn, device=DEVICE)
        swizzled.zero_()
        convert_nvfp4(w, codes, swizzled, scale_2, RowOrder(shuffled=True, gated=gated), tile=128)
        assert equal(codes, gather_rows(stored["weight"], index))
        assert equal(swizzled, swizzle_scales(gather_rows(stored["weight_scale"], index)))


def nvfp4_buffers(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    units, rows, cols = w.shape
    return (
        torch.empty(units, rows, cols // 2, dtype=torch.uint8, device=DEVICE),
        torch.empty(units, rows, cols // 16, dtype=torch.float8_e4m3fn, device=DEVICE),
        torch.empty(units, device=DEVICE),
    )


def poison(buffers: Sequence[Tensor]) -> None:
    for buffer in buffers:
        buffer.view(torch.uint8).fill_(0xAB)


def bench_quantizers(copy: float) -> list[Result]:
    results = []
    for rows in (4096, 16384):
        cols = 2048
        sets = [torch.randn(rows, cols, device=DEVICE).bfloat16() for _ in range(8)]
        for name, quantize, out in (("nvfp4", quantize_nvfp4, 0.5 + 1 / 16), ("fp8", quantize_fp8, 1.0)):
            moved = rows * (cols * (2 + out) + 4)
            seconds = graphed([lambda x=x, quantize=quantize: quantize(x) for x in sets])
            note = f"{rows} x {cols}, {seconds * 1e6:.1f} us, {moved / seconds / copy:.0%} of the copy rate"
            rate = moved / seconds / 1e9
            results.append(make_result(f"quantize_{name}_gbs_m{rows}", rate, "GB/s", limit=copy / 1e9, note=note))
    return results


def bench_conversion(copy: float) -> list[Result]:
    stacks = [(EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER), *((1, n, k) for n, k in ATTENTION)]
    layer = [(torch.randn(shape, device=DEVICE) * 0.02).bfloat16() for shape in stacks]
    weights = sum(w.numel() for w in layer)
    results = []
    for name, out in (("nvfp4", 0.5 + 1 / 16), ("fp8", 1.0), ("fp8_channel", 1.0)):
        convert: Callable[..., None]
        if name == "nvfp4":
            targets = [nvfp4_buffers(w) for w in layer]
            convert = convert_nvfp4
        else:
            sizes = [w.shape[:2] if name == "fp8_channel" else w.shape[:1] for w in layer]
            targets = [
                [torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=DEVICE), torch.empty(size, device=DEVICE)]
                for w, size in zip(layer, sizes, strict=True)
            ]
            convert = convert_fp8

        def whole(targets: Sequence[Sequence[Tensor]] = targets, convert: Callable[..., None] = convert) -> None:
            for w, target in zip(layer, targets, strict=True):
                convert(w, *target)

        each = [
            statistics.median(times(lambda w=w, t=t, convert=convert: convert(w, *t), 20)) * 1e6
            for w, t in zip(layer, targets, strict=True)
        ]
        spans = times(lambda whole=whole: [whole() for _ in range(LAYERS)], 5)
        seconds, moved = statistics.median(spans), LAYERS * weights * (2 + out)
        parts = ", ".join(f"{'x'.join(map(str, w.shape))} {us:.0f} us" for w, us in zip(layer, each, strict=True))
        note = f"{LAYERS * weights / 1e9:.1f}e9 weights, {moved / seconds / copy:.0%} of the copy rate; {parts}"
        limit = moved / copy * 1e3
        results.append(make_result(f"convert_{name}_30b_ms", seconds * 1e3, "ms", limit=limit, note=note))
        del targets
    return results


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
