"""Where the time of steps goes: kernels by what they are for, and the time in which the device waits."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from msgspec import Struct
from torch.profiler import ProfilerActivity, profile

# What a kernel's name holds, in the order of asking. On a CPU the names are those of torch's operations.
KINDS = (
    ("attention", ("flashinfer", "_qkv_kernel", "fmha", "flash_", "attention")),
    ("experts", ("gate_up", "_down", "finalize_kernel", "word_order")),
    ("routing", ("logits_kernel", "_softmax_", "_one_program", "_count_kernel", "_place_kernel")),
    ("linears", ("nvjet", "gemm", "cutlass", "_tokens", "_decode", "xmma", "::mm", "addmm", "_scaled_mm", "linear")),
    ("quantizers", ("_fp8_kernel", "_nvfp4_kernel")),
    ("norms and activations", ("_norm_kernel", "_bf16_kernel", "silu", "rsqrt")),
    ("sampling", ("_sum_kernel", "_draw_kernel", "searchsorted", "cumsum")),
    ("copies", ("Memcpy", "Memset", "copy", "fill_")),
)
IDLE = "waiting for the host"


class StepProfile(Struct, frozen=True):
    """`seconds` of wall, and of the device by kind; `largest`: (name, seconds) of the kernels that took longest."""

    seconds: float
    by_kind: dict[str, float]
    largest: list[tuple[str, float]]


def profile_steps(run: Callable[[], object], device: torch.device) -> StepProfile:
    """Run something once under torch's profiler, which slows the host down; on a GPU only kernels are counted."""
    on_gpu = device.type == "cuda"
    activities: list[ProfilerActivity] = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if not on_gpu:
            spent[event.key] += event.self_cpu_time_total / 1e6
        elif "CUDA" in str(event.device_type):  # the operation that launched it tells of the same time
            spent[event.key] += event.self_device_time_total / 1e6
    by_kind = sum_by_kind(spent.items())
    if on_gpu:
        by_kind[IDLE] = max(0.0, seconds - sum(by_kind.values()))
    return StepProfile(seconds, by_kind, _longest_first(spent))


def sum_by_kind(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds by kind, the longest first, of (kernel's name, seconds)."""
    sums: dict[str, float] = defaultdict(float)
    for name, seconds in times:
        sums[kind_of(name)] += seconds
    return dict(_longest_first(sums))


def _longest_first(times: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda pair: -pair[1])


def kind_of(name: str) -> str:
    """What a kernel is for, by its name; "other" where that does not tell."""
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")
