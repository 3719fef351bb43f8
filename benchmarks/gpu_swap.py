"""Swaps of routed experts of Qwen3-30B-A3B's shape on a GPU, through a staged session, from one reused buffer.

    python benchmarks/gpu_swap.py [--layers 3]

A bucket is one layer in BF16, on the GPU: two stacked tensors, or 384 of single experts. Figures are of one layer, the
commit included; the note says what 48 layers would take by multiplication. Limit: BF16 read, packed bytes written and
copied once more, at the rate of a copy. The split into phases comes from a session of its own, which waits for the GPU
at the end of every phase and is slower by that; kernels are counted in another one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gpu_quantize import copy_rate
from record import Result, make_result, save
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rollmill.moe import MoeConfig, RoutedExperts
from rollmill.quant import BF16, FP8, NVFP4, Scheme, find_capability
from rollmill.weight_sync import Policy, SyncPlan
from rollmill.weight_sync.clock import Clock
from rollmill.weight_sync.messages import Phase

CONFIG = MoeConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
SCHEMES: dict[str, Scheme] = {"bf16": BF16, "fp8": FP8(per_channel=True), "nvfp4": NVFP4(activation="none")}
LAYERS = 48  # of the model
REPEATS = 3


class SynchronousClock(Clock):
    """Waits for the GPU where a phase begins and ends, so that its kernels are counted in it."""

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        torch.cuda.synchronize()
        with super().__call__(phase):
            yield
            torch.cuda.synchronize()


class Sender:
    """A trainer's buffer, which holds one layer after another."""

    def __init__(self, form: str) -> None:
        experts, hidden, inner = CONFIG.num_experts, CONFIG.hidden_size, CONFIG.intermediate_size
        self.form = form
        self.gate_up = (torch.randn(experts, 2 * inner, hidden, device="cuda") * 0.02).bfloat16()
        self.down = (torch.randn(experts, hidden, inner, device="cuda") * 0.02).bfloat16()

    def bucket(self, layer: int) -> list[tuple[str, Tensor]]:
        prefix = f"{layer}.experts"
        if self.form == "stacked":
            return [(f"{prefix}.gate_up_proj", self.gate_up), (f"{prefix}.down_proj", self.down)]
        gate, up = self.gate_up.chunk(2, dim=1)
        named = (("gate_proj", gate), ("up_proj", up), ("down_proj", self.down))
        return [(f"{prefix}.{e}.{name}.weight", w[e]) for e in range(CONFIG.num_experts) for name, w in named]

    def next_layer(self) -> None:
        self.gate_up.neg_()
        self.down.neg_()
        torch.cuda.synchronize()


def make_policy(scheme: Scheme, layers: int) -> Policy:
    common = {"capability": find_capability("cuda"), "dtype": torch.bfloat16, "runner": "triton"}
    projections = ("gate_proj", "up_proj", "down_proj")
    experts = [RoutedExperts(f"{i}.experts", projections, CONFIG, scheme, **common) for i in range(layers)]
    return Policy(SyncPlan([slot for layer in experts for slot in layer.slots]))


def swap(policy: Policy, sender: Sender, layers: int, clock: Clock | None = None) -> tuple[list[float], float]:
    """Seconds of every bucket, and of the commit."""
    session, seconds = policy.begin(), []
    session.clock = clock or session.clock
    for layer in range(layers):
        sender.next_layer()
        start = time.perf_counter()
        session.load(sender.bucket(layer))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    session.commit()
    torch.cuda.synchronize()
    return seconds, time.perf_counter() - start


def count_kernels(policy: Policy, sender: Sender) -> tuple[int, float]:
    """Kernels, copies and fills of one layer's swap, and the milliseconds that they take on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        swap(policy, sender, 1)
    found = [e for e in profiler.events() or () if "CUDA" in str(e.device_type)]
    outside = 2  # the sender's
    return len(found) - outside, sum(e.time_range.elapsed_us() for e in found) / 1e3


def measure(name: str, form: str, layers: int, copy: float) -> Result:
    scheme = SCHEMES[name]
    policy, sender = make_policy(scheme, layers), Sender(form)
    swap(policy, sender, layers)  # the cold load
    swap(policy, sender, layers)  # compiles what is left, and fills the allocator
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runs = [swap(policy, sender, layers) for _ in range(REPEATS)]
    peak = torch.cuda.max_memory_allocated() - before
    bucket = statistics.median(s for seconds, _ in runs for s in seconds) * 1e3
    commit = statistics.median(s for _, s in runs) / layers * 1e3
    clock = SynchronousClock()
    swap(policy, sender, layers, clock)
    phases = ", ".join(f"{phase} {s / layers * 1e3:.2f}" for phase, s in clock.seconds.items() if phase != "pause")
    kernels, busy = count_kernels(policy, sender)
    packed = sum(slot.num_bytes for slot in policy.plan.slots) / layers
    read = sender.gate_up.nbytes + sender.down.nbytes
    note = (
        f"{len(sender.bucket(0))} tensors; load {bucket:.2f}, commit {commit:.2f}; waiting at every phase: {phases}; "
        f"{kernels} kernels, {busy:.2f} ms of GPU time with the sender's 0.8; "
        f"peak {peak / 2**30:.2f} GiB over {packed * layers / 2**30:.2f} packed; "
        f"{LAYERS} layers by multiplication: {(bucket + commit) * LAYERS:.0f} ms"
    )
    limit = (read + 3 * packed) / copy * 1e3
    result = make_result(f"gpu_swap_{name}_{form}_layer_ms", bucket + commit, "ms", limit=limit, note=note)
    print(f"{result.name} {result.value:.2f} (limit {limit:.2f}): {note}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=3)
    layers = parser.parse_args().layers
    torch.manual_seed(0)
    copy = copy_rate()
    save("gpu_swap", [measure(name, form, layers, copy) for name in SCHEMES for form in ("stacked", "experts")])


if __name__ == "__main__":
    main()
