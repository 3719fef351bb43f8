"""Swaps of whole engines of Qwen3-30B-A3B's shape on one GPU: time in all, the pause, what is left for keys and values.

    python benchmarks/gpu_engine_swap.py [--case nvfp4_staged fp8_host bf16_streamed] [--form stacked apart]
        [--generate 64] [--repeats 5] [--endure 100] [--profile nvfp4_staged]

Weights are random; the sender's layers are views of one BF16 buffer on the GPU. `total`: from the first bucket to the
end of `commit`. `pause`: the time for which the session keeps generation from stepping. With --generate N the same
swaps again while a thread generates N sequences: `generating_total`, and `generating_gap`, the longest time between
two steps, of `host` until the copy in host memory is renewed. --endure N: so many more swaps, of two versions in turn.
Limit: BF16 read and packed bytes written (staged: copied once more), at the rate of a copy.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_quantize import copy_rate
from layer_sender import LayerSender
from random_model import QWEN3_30B_A3B, use_random_weights
from record import Result, make_result, save
from running_generation import Generation
from torch import Tensor

from rollmill.engine import Engine, EngineConfig
from rollmill.weight_sync.digest import DigestQueue

CASES = {  # quant, swap, tokens of keys and values, their dtype
    "nvfp4_staged": ("nvfp4_w4a16", "staged", 350_000, "auto"),
    "nvfp4_host": ("nvfp4_w4a16", "host", 450_000, "auto"),
    "fp8_staged": ("fp8_channel", "staged", 200_000, "fp8"),
    "fp8_host": ("fp8_channel", "host", 350_000, "auto"),
    "fp8_streamed": ("fp8_channel", "streamed", 350_000, "auto"),
    "bf16_streamed": ("bf16", "streamed", 60_000, "auto"),
}
MAIN = ("nvfp4_staged", "fp8_host", "bf16_streamed")  # figures called after the format alone
PEERS = {"bf16": (1560, "SGLang 0.5.12.post1, BF16"), "fp8": (6380, "vLLM 0.22.0, BF16 into FP8")}


class Gate:
    """Measures for how long a policy's gate is held."""

    def __init__(self, engine: Any) -> None:
        self.held: list[float] = []
        self.inner = engine._policy.commit_gate
        engine._policy.commit_gate = self

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.inner():
            start = time.perf_counter()
            yield
            self.held.append(time.perf_counter() - start)


def swap(engine: Any, sender: LayerSender, version: str, *, churn: bool = False) -> tuple[float, Any]:
    """Seconds in all, and the report. Trainers take longer than a mirror: it is waited for before."""
    engine._policy.settle()
    start = time.perf_counter()
    with engine.weight_session(version=version) as session:
        for bucket in sender.buckets(churn=churn):
            session.load(bucket)
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds, session.report


def bytes_of(engine: Any) -> list[int]:
    """A hash of every packed tensor's bytes."""
    tensors: list[Tensor] = [t for slot in engine._policy.plan.slots for t in slot.tensors.values()]
    queue = DigestQueue(limit=1 << 62)
    hashes = [queue.add(t.view(-1).view(torch.uint8)[None]) for t in tensors]
    queue.run()
    return torch.cat([h.values for h in hashes]).tolist()


def memory() -> str:
    free, total = torch.cuda.mem_get_info()
    gib = 2**30
    return (
        f"allocated {torch.cuda.memory_allocated() / gib:.2f}, peak {torch.cuda.max_memory_allocated() / gib:.2f}, "
        f"reserved {torch.cuda.memory_reserved() / gib:.2f}, free {free / gib:.2f} of {total / gib:.2f} GiB"
    )


def measure(case: str, form: Any, engine: Any, arguments: argparse.Namespace, copy: float) -> list[Result]:
    sender, gate, times, holds, known = LayerSender(arguments.config, form), Gate(engine), [], [], []
    for repeat in range(arguments.repeats + 1):
        sender.fill(repeat)
        seconds, report = swap(engine, sender, f"{form} {repeat}")
        if repeat:
            times.append(seconds)
            holds.append(sum(gate.held[-1:]))
            phases = ", ".join(f"{phase} {s * 1e3:.0f}" for phase, s in report.seconds.items())
            held, start = gate.held[-1] * 1e3, time.perf_counter()
            engine._policy.settle()
            phases += f"; mirror {(time.perf_counter() - start) * 1e3:.0f}"
            print(f"  {case} {form} {report.digest[:8]}: {seconds * 1e3:.0f} ms; gate {held:.0f}; {phases}", flush=True)
            known.append(bytes_of(engine))
    print(f"  {memory()}", flush=True)
    packed = sum(slot.num_bytes for slot in engine._policy.plan.slots)
    limit = (sender.num_bytes + packed * (3 if engine.config.swap == "staged" else 1)) / copy * 1e3
    note = f"{engine.config.swap}, {sender.num_tensors} tensors; {memory()}"
    quant, name = case.split("_")[0], f"swap_{case.split('_')[0] if case in MAIN else case}"
    name += "" if form == "stacked" else "_apart"
    peer, peer_name = PEERS.get(quant, (None, None))
    total, held = statistics.median(times) * 1e3, statistics.median(holds) * 1e3
    results = [
        make_result(f"{name}_total_ms", total, "ms", limit=limit, peer=peer, peer_name=peer_name, note=note),
        make_result(f"{name}_pause_ms", held, "ms", note=note),
    ]
    if arguments.generate:
        results += under_load(name, engine, sender, known, limit, arguments)
    for result in results:
        print(f"{result.name} {result.value:.0f} (limit {result.limit or 0:.0f}): {result.note}", flush=True)
    if case in arguments.profile:
        profile(engine, sender, form)
    return results


def under_load(
    name: str, engine: Any, sender: LayerSender, known: list[list[int]], limit: float, arguments: argparse.Namespace
) -> list[Result]:
    """The same swaps while sequences are generated: packed bytes must be those of the swaps alone."""
    during = "a swap and its mirror" if engine.config.swap == "host" else "a swap"
    generation, times, gaps, counts = Generation(engine, arguments.generate), [], [], []
    try:
        generation.start()
        quiet = generation.step_seconds()
        for repeat, expected in enumerate(known):
            sender.fill(repeat + 1)
            generation.versions.append(f"{sender.form} under load {repeat}")
            start = time.perf_counter()
            seconds, _ = swap(engine, sender, generation.versions[-1])
            engine._policy.settle()  # its mirror, too
            end = time.perf_counter()
            generation.wait(5)
            found = generation.gaps(start, end)
            times.append(seconds)
            gaps.append(max(found))
            counts.append(len(found))
            assert bytes_of(engine) == expected, "a swap under load gave other bytes"
            print(
                f"  under load: {seconds * 1e3:.0f} ms in all, {len(found)} steps during {during}, longest gap "
                f"{max(found) * 1e3:.0f}, median {statistics.median(found) * 1e3:.0f}, quiet {quiet * 1e3:.0f}",
                flush=True,
            )
    finally:
        generation.stop()
    note = (
        f"{len(times)} swaps while {arguments.generate} sequences are generated, {statistics.median(counts):.0f} steps "
        f"during {during} (median), a step takes {quiet * 1e3:.0f} ms without one; bytes as without a generation, no "
        f"request lost, every version in every completion's spans, no graph captured again; {memory()}"
    )
    return [
        make_result(f"{name}_generating_total_ms", statistics.median(times) * 1e3, "ms", limit=limit, note=note),
        make_result(f"{name}_generating_gap_ms", max(gaps) * 1e3, "ms", note=f"the longest gap between steps; {note}"),
    ]


def profile(engine: Any, sender: LayerSender, form: str) -> None:
    """Where Python's time goes, then what the GPU does."""
    python = cProfile.Profile()
    python.enable()
    swap(engine, sender, f"{form} profiled")
    python.disable()
    pstats.Stats(python).sort_stats("tottime").print_stats(32)
    from torch.profiler import ProfilerActivity, profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as found:
        seconds, _ = swap(engine, sender, f"{form} profiled again")
    busy = sum(event.self_device_time_total for event in found.key_averages()) / 1e3
    print(f"  GPU busy {busy:.0f} ms of {seconds * 1e3:.0f}", flush=True)
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=60)
    print(table, flush=True)


def endure(case: str, engine: Any, count: int, config: dict[str, Any]) -> Result:
    """Two versions in turn, the buffer changing between buckets: bytes must be theirs each time, memory flat."""
    sender, known, used = LayerSender(config), {}, []
    for turn in range(count):
        sender.fill(100 + turn % 2)
        _, report = swap(engine, sender, f"turn {turn}", churn=True)
        found = (report.digest, bytes_of(engine))
        expected = known.setdefault(turn % 2, found)
        assert found == expected, f"swap {turn} gave other bytes"
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert known[0] != known[1]
    note = f"bytes equal each time; bytes allocated, reserved: {used[2]} after 3, {used[-1]} at the end"
    name = case.split("_")[0] if case in MAIN else case
    print(f"{case}: {count} swaps, {note}", flush=True)
    return make_result(f"swap_{name}_endured_swaps", count, "swaps", note=note)


def run(case: str, folder: Path, arguments: argparse.Namespace, copy: float) -> list[Result]:
    quant, mode, tokens, dtype = CASES[case]
    start = time.perf_counter()
    tokens = arguments.kv_tokens or tokens
    settings = {"quant": quant, "swap": mode, "kv_cache_dtype": dtype, "attention": arguments.attention}
    config = EngineConfig(device="cuda", kv_cache_tokens=tokens, max_batch_size=256, **settings)
    with Engine(folder, config) as engine:
        torch.cuda.synchronize()
        packed = sum(slot.num_bytes for slot in engine._policy.plan.slots)
        print(
            f"{case}: open in {time.perf_counter() - start:.1f} s, {packed / 1e9:.2f} GB of weights, "
            f"{engine.info()['kv_cache_tokens']} tokens of KV; {memory()}",
            flush=True,
        )
        results = [r for form in arguments.form for r in measure(case, form, engine, arguments, copy)]
        if arguments.endure:
            results.append(endure(case, engine, arguments.endure, arguments.config))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", default=list(MAIN), choices=CASES)
    parser.add_argument("--form", nargs="+", default=["stacked", "apart"])
    parser.add_argument("--layers", type=int, default=QWEN3_30B_A3B["num_hidden_layers"])
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--endure", type=int, default=0)
    parser.add_argument("--kv-tokens", type=int, default=0)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--profile", nargs="*", default=[], choices=CASES)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    arguments.config = QWEN3_30B_A3B | {"num_hidden_layers": arguments.layers}
    copy, results = copy_rate(), []
    with tempfile.TemporaryDirectory() as folder:
        use_random_weights(Path(folder), num_hidden_layers=arguments.layers)
        for case in arguments.case:
            results += run(case, Path(folder), arguments, copy)
            gc.collect()
            torch.cuda.empty_cache()
            if not arguments.no_save:
                save("gpu_engine_swap", results)


if __name__ == "__main__":
    main()
