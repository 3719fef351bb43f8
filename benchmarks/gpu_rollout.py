"""Rollouts of Qwen3-30B-A3B's shape on one GPU, random weights: output tokens a second, 512 in and 512 out.

    python benchmarks/gpu_rollout.py [--quant fp8_channel nvfp4_w4a16 fp8_channel+kv8] [--batch 1 32 256] [--profile]
        [--batch-invariant] [--capture] [--attention flashinfer]

Every run has prompts of its own; sampled-token log-probs are returned. 256 is 64 prompts x 4; `+kv8` keeps keys and
values in FP8. `--batch-invariant` measures each format a second time, with `EngineConfig(batch_invariant=True)`.
`--capture` captures the graphs of all batch sizes before the clock starts, as peers do at their start; without, those
of sizes that sequences come to as they end or give their pages back are captured on the way. The KV cache has as many
tokens as fit beside the weights into 88 % of the GPU's memory, as the peers' had. Peers (SGLang 0.5.12.post1 and vLLM
0.22.0, default FP8 tiles, BF16 keys and values) stand beside it: the better one in its best run,
before or after ours (the notes say when). A batch-invariant run stands beside one without.
Limit: the bytes that a step must read at the 3.02 TB/s of a copy; for BF16 at 256, whose keys and values do not all
fit, those of 411 steps of 256 sequences, 101 of the 205 that fit to their end, and 101 of the rest.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from random_model import QWEN3_30B_A3B, use_random_weights
from record import Result, make_result, save

from rollmill.engine import Engine, EngineConfig, SamplingParams
from rollmill.engine.step_profile import profile_steps

SGLANG, VLLM = "SGLang 0.5.12.post1", "vLLM 0.22.0"
PEERS = {  # output tokens/s, and whose: the best that was measured, not in the run that prints it
    ("bf16", 1): (209, SGLANG),
    ("bf16", 32): (1500, VLLM),
    ("bf16", 256): (6454, VLLM),
    ("fp8_channel", 1): (214, SGLANG),
    ("fp8_channel", 32): (2243, SGLANG),
    ("fp8_channel", 256): (10644, VLLM),
    ("nvfp4_w4a16", 1): (212, VLLM),
    ("nvfp4_w4a16", 32): (2590, VLLM),
    ("nvfp4_w4a16", 256): (10225, VLLM),
}
LIMITS = {  # ms a step
    ("bf16", 1): 2.0, ("bf16", 32): 18.4, ("bf16", 256): 30.2,
    ("fp8_channel", 1): 1.1, ("fp8_channel", 32): 9.6, ("fp8_channel", 256): 16.5,
    ("nvfp4_w4a16", 32): 5.9, ("nvfp4_w4a16", 256): 12.2, ("nvfp4", 32): 5.9, ("nvfp4", 256): 12.2,
}  # fmt: skip
NAMES = {"fp8_channel": "fp8"}
WEIGHTS_GIB = {"bf16": 56.9, "fp8_channel": 29.2, "nvfp4_w4a16": 17.0, "nvfp4": 17.0}  # of the whole shape
PEER_KV_TOKENS = {"fp8_channel": 432_709, "nvfp4_w4a16": 556_368}  # SGLang's and vLLM's
MEMORY_FRACTION = 0.88
KV_VALUES = 48 * 4 * 2 * 128  # of one token: layers, heads, k and v
ROUTED_BYTES = 48 * 8 * 2


def kv_tokens(quant: str, kv: str, layers: int) -> int:
    """Tokens of keys and values that fit beside the weights."""
    share = layers / 48
    total = torch.cuda.get_device_properties(0).total_memory * MEMORY_FRACTION - WEIGHTS_GIB[quant] * 2**30 * share
    tokens = total / ((KV_VALUES * (1 if kv == "fp8" else 2) + ROUTED_BYTES) * share)
    return int(tokens) // 1000 * 1000


def rollout(engine: Any, batch: int, prompt_tokens: int, new_tokens: int, seed: int) -> tuple[float, list[Any]]:
    """Seconds of one batch, and what came back; prompts of another seed are in no prefix cache."""
    draw = random.Random(seed * 1000 + batch)
    group = 4 if batch == 256 else 1
    prompts = [[draw.randrange(1000, 150000) for _ in range(prompt_tokens)] for _ in range(batch // group)]
    params = SamplingParams(n=group, temperature=1.0, max_new_tokens=new_tokens, ignore_eos=True, seed=batch)
    torch.cuda.synchronize()
    start = time.perf_counter()
    outs = engine.generate(prompts, params)
    torch.cuda.synchronize()
    return time.perf_counter() - start, outs


def measure(
    engine: Any, quant: str, kv: str, batch: int, arguments: argparse.Namespace, plain: dict[int, float]
) -> Result:
    """`plain`: what batches gave without batch invariance, for one with it to stand beside; filled by one without."""
    invariant = engine.config.batch_invariant
    rollout(engine, batch, arguments.prompt, 8, seed=0)  # compiles, captures
    first, _ = rollout(engine, batch, arguments.prompt, 1, seed=1)
    runs = []
    for seed in range(arguments.repeats):
        seconds, outs = rollout(engine, batch, arguments.prompt, arguments.new, seed=2 + seed)
        assert all(len(out.token_ids) == arguments.new for out in outs)
        assert all(bool((out.logprobs <= 0).all()) for out in outs)
        runs.append(batch * arguments.new / seconds)
    best = statistics.median(runs)
    decode = (batch * (arguments.new - 1)) / (batch * arguments.new / best - first)
    as_peers = arguments.prompt == arguments.new == 512 and kv == "auto"
    limit = LIMITS.get((quant, batch)) if as_peers else None
    if invariant:
        peer, peer_name = plain[batch], "without batch_invariant, same run"
    else:
        plain[batch] = best
        peer, peer_name = PEERS.get((quant, batch), (None, None)) if as_peers else (None, None)
    kind = kv_suffix(kv) + ("_invariant" if invariant else "")
    beside = "" if peer is None else f", peer {peer:.0f} ({best / peer:.2f} x)"
    print(
        f"{quant}{kind} {batch}: {best:.0f} tok/s (decode {decode:.0f}; first token {first:.2f} s){beside}",
        flush=True,
    )
    note = f"decode only {decode:.0f}; {arguments.prompt} in, {arguments.new} out; runs {[round(r) for r in runs]}"
    return make_result(
        f"rollout_{NAMES.get(quant, quant)}{kv_suffix(kv)}_{batch}{'_invariant' if invariant else ''}_toks",
        best,
        "tok/s",
        limit=None if limit is None else batch / limit * 1e3,
        peer=peer,
        peer_name=peer_name,
        note=note,
    )


def kv_suffix(kv: str) -> str:
    return "_kv8" if kv == "fp8" else ""


def kv_result(quant: str, kv: str, tokens: int, gib: float) -> Result:
    return make_result(
        f"kv_tokens_{NAMES.get(quant, quant)}{kv_suffix(kv)}",
        tokens,
        "tokens",
        peer=PEER_KV_TOKENS.get(quant) if kv == "auto" else None,
        peer_name="SGLang (FP8), vLLM (NVFP4)",
        note=f"served the rollouts above; {gib:.1f} GiB after opening, weights and buffers included",
    )


def profile(engine: Any, batch: int, prompt_tokens: int) -> None:
    """Where decoding goes, the prefill (cached, but for a page) included: milliseconds a step by kind of kernel."""
    steps = 65
    rollout(engine, batch, prompt_tokens, 4, seed=0)
    spent = profile_steps(lambda: rollout(engine, batch, prompt_tokens, steps, seed=0), torch.device("cuda"))
    kinds = ", ".join(f"{kind} {1e3 * seconds / steps:.2f}" for kind, seconds in spent.by_kind.items())
    print(f"  {batch} requests, ms a step of {1e3 * spent.seconds / steps:.2f} (profiled): {kinds}")
    for name, seconds in spent.largest[:16]:
        print(f"    {1e6 * seconds / steps:9.1f} us  {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quant", nargs="+", default=["fp8_channel", "nvfp4_w4a16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--layers", type=int, default=QWEN3_30B_A3B["num_hidden_layers"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kv-tokens", type=int, help="in place of as many as fit: for models of fewer layers")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--capture", action="store_true")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        use_random_weights(Path(folder), num_hidden_layers=arguments.layers)
        for name in arguments.quant:
            quant, _, kv = name.partition("+")
            plain: dict[int, float] = {}
            for invariant in (False, True)[: 1 + arguments.batch_invariant]:
                results += run(folder, quant, "fp8" if kv else "auto", arguments, invariant, plain)
            if not arguments.no_save:
                save("gpu_rollout", results)


def run(
    folder: str,
    quant: str,
    kv: Literal["auto", "fp8"],
    arguments: argparse.Namespace,
    invariant: bool,
    plain: dict[int, float],
) -> list[Result]:
    """All batch sizes in one engine."""
    start, results = time.perf_counter(), []
    tokens = arguments.kv_tokens or kv_tokens(quant, kv, arguments.layers)
    config = EngineConfig(
        quant=quant,
        device="cuda",
        max_step_tokens=8192,
        kv_cache_tokens=tokens,
        kv_cache_dtype=kv,
        swap="streamed",
        batch_invariant=invariant,
        attention=arguments.attention,
    )
    engine: Any = Engine(folder, config)
    with engine:
        gib, took = torch.cuda.memory_allocated() / 2**30, time.perf_counter() - start
        print(f"{quant}, KV {kv}: open in {took:.1f} s, {gib:.1f} GiB, {tokens} tokens", flush=True)
        if arguments.capture:
            engine.rollouts.forward.graphs.capture_all()
        for batch in arguments.batch:
            results.append(measure(engine, quant, kv, batch, arguments, plain))
            if arguments.profile:
                profile(engine, batch, arguments.prompt)
    del engine
    torch.cuda.empty_cache()
    return results if invariant else [*results, kv_result(quant, kv, tokens, gib)]


if __name__ == "__main__":
    main()
