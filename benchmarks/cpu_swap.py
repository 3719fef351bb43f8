"""Whole-model hot swaps on a CPU: BF16 tensors of a trainer -> FP8 or NVFP4 engine, SmolLM2 upcycled to a 4-expert MoE.

Limit: the time in which this machine copies as many bytes as arrive (BF16 read once, written once).
Peer: ModelOpt's own quantizer functions over the same weights, if nvidia-modelopt is installed (no engine runs
ModelOpt's formats on a CPU; the peer only quantizes, it stages and packs nothing).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import Result, make_result, save
from torch import Tensor

from rollmill.engine import EngineConfig, LanguageEngine
from rollmill.engine.demo.model import build_model
from rollmill.engine.env import cache_home

REPEATS = 5


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy_limit(weights: dict[str, Tensor]) -> float:
    targets = {name: torch.empty_like(w) for name, w in weights.items()}

    def copy_all() -> None:
        for name, weight in weights.items():
            targets[name].copy_(weight)

    copy_all()
    return statistics.median(seconds_of(copy_all) for _ in range(REPEATS))


def modelopt_seconds(weights: dict[str, Tensor], quant: str) -> float | None:
    """ModelOpt 0.47: every quantized weight through its own quantizer, experts one by one."""
    try:
        from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
    except ImportError:
        return None
    linears = [
        m for n, w in weights.items() if ".layers." in n and w.ndim > 1 and "gate.weight" not in n for m in _2d(w)
    ]

    def quantize_all() -> None:
        for weight in linears:
            if quant == "nvfp4":
                NVFP4QTensor.quantize(weight, 16)
            else:
                FP8QTensor.quantize(weight)

    quantize_all()
    return statistics.median(seconds_of(quantize_all) for _ in range(3))


def _2d(weight: Tensor) -> list[Tensor]:
    return [weight] if weight.ndim == 2 else list(weight)


def measure(folder: Path, quant: str) -> Result:
    with LanguageEngine(folder, EngineConfig(quant=quant)) as engine:
        weights = {n: t.clone() for n, t in engine.checkpoint.source}
        times, phases = [], []
        for repeat in range(REPEATS + 1):
            times.append(seconds_of(lambda repeat=repeat: engine.update_weights(weights, version=f"r{repeat}")))
            phases.append(engine.update_weights(weights, version=f"s{repeat}").seconds)
        times = times[1:]  # the first one warms up
    limit, peer = copy_limit(weights), modelopt_seconds(weights, quant)
    split = ", ".join(f"{phase} {statistics.median(p[phase] for p in phases) * 1e3:.0f}" for phase in phases[0])
    note = f"min {min(times) * 1e3:.0f}, max {max(times) * 1e3:.0f}; ms by phase: {split}"
    print(f"{quant}: {statistics.median(times) * 1e3:.0f} ms ({note}); copy limit {limit * 1e3:.0f} ms; peer {peer}")
    return make_result(
        f"cpu_swap_{quant}_ms",
        statistics.median(times) * 1e3,
        "ms",
        limit=limit * 1e3,
        peer=None if peer is None else peer * 1e3,
        peer_name=None if peer is None else "ModelOpt 0.47, quantize only",
        note=note,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.model or build_model(Path(cache_home()) / "rollmill", print)
    save("cpu_swap", [measure(folder, quant) for quant in ("fp8", "nvfp4")])


if __name__ == "__main__":
    main()
