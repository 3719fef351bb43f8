"""Ten thousand short requests with random cancellations and a hundred swaps: does memory grow, do pages come back?

The model is a random one of 3 layers and 64 channels with 8 experts, or `--model`. Memory: RSS after the last request
against RSS after the first tenth. In bfloat16 a CPU's RSS grows further before it levels off: a kernel is compiled for
every shape, as a bare loop of torch.nn.functional.linear over as many batch sizes shows, too.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from msgspec import Struct
from record import make_result, save
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rollmill.engine import EngineConfig, LanguageEngine, SamplingParams

IN_FLIGHT = 48  # calls at a time, more than there are seats
STUCK_SECONDS = 120.0


class Endurance(Struct):
    """What came of the requests. `growth`: RSS at the end, minus RSS after the first tenth (MiB)."""

    finished: int = 0
    cancelled: int = 0
    aborted: int = 0
    swaps: int = 0
    preemptions: int = 0
    lost_pages: int = 0
    seconds: float = 0.0
    growth: float = 0.0


def rss_mib() -> float:
    """Resident memory, once the allocator has given back what it can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def request(engine: LanguageEngine, rng: random.Random, result: Endurance) -> None:
    """One call: whole, cancelled, or a stream that is left early."""
    prompt = [rng.randrange(100) for _ in range(rng.choice([3, 20, 40]))]
    if rng.random() < 0.5:
        prompt = [*range(32), *prompt[:9]]  # a prefix that comes again
    params = SamplingParams(n=rng.choice([1, 1, 4]), max_new_tokens=rng.randrange(1, 12))
    match rng.randrange(8):
        case 0:
            task = asyncio.ensure_future(engine.agenerate(prompt, params))
            await asyncio.sleep(rng.random() * 0.05)
            task.cancel()
            await asyncio.wait([task])
            result.cancelled += task.cancelled()
            result.finished += not task.cancelled()
        case 1:
            stream = engine.stream(prompt, params)
            async for _ in stream:
                break
            await stream.aclose()
            result.cancelled += 1
        case _:
            outs = await engine.agenerate(prompt, params, return_routed_experts=rng.random() < 0.3)
            assert len(outs) == params.n
            result.finished += 1
            result.aborted += any(out.finish_reason == "abort" for out in outs)


async def requests(engine: LanguageEngine, rng: random.Random, count: int, result: Endurance) -> None:
    """`count` calls, `IN_FLIGHT` at a time."""
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await asyncio.wait_for(request(engine, rng, result), STUCK_SECONDS)

    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))


async def endure(engine: LanguageEngine, count: int, swaps: int, seed: int = 0) -> Endurance:
    """A swap, in a pause or without, after every share of `count` requests; memory is looked at from a tenth on."""
    rng, result, start = random.Random(seed), Endurance(), time.perf_counter()
    weights = {name: tensor.clone() for name, tensor in engine.checkpoint.source}
    before = None
    for swap in range(swaps):
        share = asyncio.ensure_future(
            requests(engine, rng, count * (swap + 1) // swaps - count * swap // swaps, result)
        )
        await asyncio.sleep(0.02)
        await asyncio.to_thread(swap_weights, engine, weights, rng.choice(["keep", "retract", "abort", None]))
        result.swaps += 1
        await share
        if before is None and 10 * (swap + 1) >= swaps:
            before = rss_mib()
    pool = engine.rollouts.scheduler.pool
    pool.forget_prefixes()
    result.lost_pages = pool.num_pages - 1 - pool.num_available
    result.preemptions = int(engine.info()["preemptions"])
    result.seconds, result.growth = time.perf_counter() - start, rss_mib() - (before or 0.0)
    return result


def swap_weights(engine: LanguageEngine, weights: dict[str, torch.Tensor], mode: str | None) -> None:
    if mode is not None:
        engine.pause(mode)  # type: ignore[arg-type]
    engine.update_weights(weights)
    if mode is not None:
        engine.resume()


def write_model(folder: str) -> str:
    """A seeded random Qwen3-MoE."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=200,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            max_position_embeddings=64,
            eos_token_id=None,
            initializer_range=0.2,
        )
    )
    model.bfloat16().save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = EngineConfig(dtype=arguments.dtype, max_batch_size=32, kv_cache_tokens=1024)
    with TemporaryDirectory() as folder, LanguageEngine(arguments.model or write_model(folder), config) as engine:
        result = asyncio.run(endure(engine, arguments.requests, arguments.swaps))
    note = f"{result.finished} finished, {result.cancelled} cancelled, {result.aborted} aborted by a pause; "
    note += f"{arguments.dtype}, {result.swaps} swaps, {result.preemptions} preemptions, {result.seconds:.0f} s"
    print(f"growth {result.growth:.1f} MiB, {result.lost_pages} pages lost; {note}")
    size = f"{arguments.requests // 1000}k"
    save(
        "endurance",
        [
            make_result(f"endurance_{size}_rss_growth_mib", result.growth, "MiB", note=note),
            make_result(f"endurance_{size}_lost_pages", result.lost_pages, "pages"),
            make_result(
                f"endurance_{size}_requests_per_second",
                (result.finished + result.cancelled) / result.seconds,
                "1/s",
            ),
        ],
    )


if __name__ == "__main__":
    main()
