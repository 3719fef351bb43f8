"""Rollouts of Qwen3-30B-A3B's shape on one GPU, random weights: output tokens a second, 512 in and 512 out.

    python benchmarks/gpu_rollout.py [--quant fp8 nvfp4_w4a16] [--batch 1 32 256] [--layers 48] [--profile]

Sampled-token log-probs are returned. 256 is 64 prompts x 4. Peers (measured on another day on the same kind of machine,
SGLang 0.5.12.post1 and vLLM 0.22.0, default FP8 tiles) stand beside it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_model import QWEN3_30B_A3B, use_random_weights
from record import Result, make_result, save

from rollmill.engine import Engine, EngineConfig, SamplingParams

PEERS = {  # output tokens/s: the better of the two
    ("bf16", 1): 209, ("bf16", 32): 1500, ("bf16", 256): 6454,
    ("fp8_channel", 1): 210, ("fp8_channel", 32): 2223, ("fp8_channel", 256): 10360,
    ("nvfp4_w4a16", 1): 210, ("nvfp4_w4a16", 32): 2563, ("nvfp4_w4a16", 256): 10015,
}  # fmt: skip
NAMES = {"fp8_channel": "fp8"}


def rollout(engine: Any, batch: int, prompt_tokens: int, new_tokens: int) -> tuple[float, list[Any]]:
    """Seconds of one batch, and what came back."""
    draw = random.Random(batch)
    group = 4 if batch == 256 else 1
    prompts = [[draw.randrange(1000, 150000) for _ in range(prompt_tokens)] for _ in range(batch // group)]
    params = SamplingParams(n=group, temperature=1.0, max_new_tokens=new_tokens, ignore_eos=True, seed=batch)
    torch.cuda.synchronize()
    start = time.perf_counter()
    outs = engine.generate(prompts, params)
    torch.cuda.synchronize()
    return time.perf_counter() - start, outs


def measure(engine: Any, quant: str, batch: int, arguments: argparse.Namespace) -> Result:
    rollout(engine, batch, arguments.prompt, 8)  # compiles, captures
    first, _ = rollout(engine, batch, arguments.prompt, 1)
    runs = []
    for _ in range(arguments.repeats):
        seconds, outs = rollout(engine, batch, arguments.prompt, arguments.new)
        assert all(len(out.token_ids) == arguments.new for out in outs)
        assert all(bool((out.logprobs <= 0).all()) for out in outs)
        runs.append(batch * arguments.new / seconds)
    best = sorted(runs)[len(runs) // 2]
    decode = (batch * (arguments.new - 1)) / (batch * arguments.new / best - first)
    peer = PEERS.get((quant, batch))
    beside = "" if peer is None else f", peer {peer} ({best / peer:.2f} x)"
    print(f"{quant} {batch}: {best:.0f} tok/s (decode {decode:.0f}; first token {first:.2f} s){beside}", flush=True)
    note = f"decode only {decode:.0f}; {arguments.prompt} in, {arguments.new} out; runs {[round(r) for r in runs]}"
    return make_result(
        f"rollout_{NAMES.get(quant, quant)}_{batch}_toks",
        best,
        "tok/s",
        peer=peer,
        peer_name="the better of SGLang 0.5.12.post1 and vLLM 0.22.0, another day",
        note=note,
    )


def profile(engine: Any, batch: int) -> None:
    """Where a decoding step goes: GPU time by kernel, and the share of the wall."""
    from torch.profiler import ProfilerActivity, profile as torch_profile

    rollout(engine, batch, 64, 4)
    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        seconds, _ = rollout(engine, batch, 64, 24)
    busy = sum(event.self_device_time_total for event in prof.key_averages()) / 1e6
    print(f"profile, {batch} requests: {seconds:.3f} s of wall, {busy:.3f} s of kernels")
    print(prof.key_averages().table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quant", nargs="+", default=["fp8_channel", "nvfp4_w4a16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--layers", type=int, default=QWEN3_30B_A3B["num_hidden_layers"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        use_random_weights(Path(folder), num_hidden_layers=arguments.layers)
        for quant in arguments.quant:
            start = time.perf_counter()
            tokens = max(arguments.batch) * (arguments.prompt + arguments.new + 32)
            config = EngineConfig(
                quant=quant, device="cuda", max_step_tokens=8192, kv_cache_tokens=max(tokens, 40960), swap="streamed"
            )
            with Engine(folder, config) as engine:
                gib = torch.cuda.memory_allocated() / 2**30
                print(f"{quant}: open in {time.perf_counter() - start:.1f} s, {gib:.1f} GiB", flush=True)
                for batch in arguments.batch:
                    results.append(measure(engine, quant, batch, arguments))
                if arguments.profile:
                    profile(engine, 32)
            del engine
            torch.cuda.empty_cache()
    if not arguments.no_save:
        save("gpu_rollout", results)


if __name__ == "__main__":
    main()
