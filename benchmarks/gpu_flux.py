"""FLUX.1-dev's shape on one GPU, random weights: milliseconds of a denoising step, and samples a second of rollouts.

    python benchmarks/gpu_flux.py [--quant bf16 fp8_channel] [--size 1024] [--batch 1] [--layers 19 38] [--peer]
        [--rollout] [--swap] [--profile]

A step is one forward of the transformer as a rollout calls it, everything in it. `--peer`: diffusers' own model with
the same weights, eager, in BF16, and how far our outputs lie from its.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_flux import RandomFlux, use_random_weights
from record import Result, make_result, save

from rollmill.engine import DiffusionParams, Engine, EngineConfig, FlowSDE
from rollmill.engine.dit.families import Embeds
from rollmill.engine.dit.families.tokens import grid_ids

TEXT = 512
PEERS = {"bf16": 128.0, "fp8": 87.0}  # published: SGLang (BF16), flumina (FP8); 1024 x 1024, batch 1
NAMES = {"fp8_channel": "fp8"}


def inputs(config: dict[str, Any], size: int, batch: int) -> dict[str, Any]:
    """Keywords of the forward: values in the range of a real step's."""
    generator = torch.Generator("cuda").manual_seed(size + batch)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    side = size // 16
    return {
        "hidden_states": normal(batch, side * side, config["in_channels"]),
        "encoder_hidden_states": normal(batch, TEXT, config["joint_attention_dim"]),
        "pooled_projections": normal(batch, config["pooled_projection_dim"]),
        "timestep": torch.full((batch,), 0.5, device="cuda", dtype=torch.bfloat16),
        "guidance": torch.full((batch,), 3.5, device="cuda"),
        "txt_ids": torch.zeros(TEXT, 3, device="cuda"),
        "img_ids": grid_ids(side, side).cuda(),
        "return_dict": False,
    }


def timed(step: Callable[[], Any], repeats: int = 10) -> list[float]:
    """Milliseconds of each of some steps, sorted; by the GPU's clock, after two that warm up."""
    for _ in range(2):
        step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)


def diffusers_model(config: dict[str, Any]) -> Any:
    """diffusers' model with the same weights, in BF16."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    with torch.device("meta"):
        model: Any = FluxTransformer2DModel.from_config(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name, value in RandomFlux(config):
        parameters[name].copy_(value)
    return model


def profile(step: Callable[[], Any], most: int = 24) -> None:
    """GPU time of a step by kernel."""
    from torch.profiler import ProfilerActivity, profile as torch_profile

    step()
    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if "CUDA" in str(event.device_type)]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels) / 1e3
    print(f"profile: {total:.2f} ms of kernels", flush=True)
    for event in kernels[:most]:
        print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:5d} x  {event.key[:110]}", flush=True)


def measure_step(engine: Any, quant: str, config: dict[str, Any], arguments: argparse.Namespace) -> Result:
    given = inputs(config, arguments.size, arguments.batch)
    times = timed(lambda: engine.transformer(**given))
    name, size = NAMES.get(quant, quant), arguments.size
    peer = PEERS.get(name) if (size, arguments.batch) == (1024, 1) else None
    middle = statistics.median(times)
    print(f"{name} {size} batch {arguments.batch}: {middle:.2f} ms ({times[0]:.2f}-{times[-1]:.2f})", flush=True)
    suffix = "" if (size, arguments.batch) == (1024, 1) else f"_{size}_{arguments.batch}"
    return make_result(
        f"flux1_{name}_step_ms{suffix}",
        middle,
        "ms",
        peer=peer,
        peer_name=None if peer is None else "published: SGLang BF16, flumina FP8",
        note=f"{size} x {size}, batch {arguments.batch}, {TEXT} text tokens; {times[0]:.1f}-{times[-1]:.1f}",
    )


def compare(engine: Any, model: Any, config: dict[str, Any], arguments: argparse.Namespace) -> None:
    """How far a forward is from diffusers' own."""
    given = inputs(config, arguments.size, arguments.batch)
    with torch.no_grad():
        theirs, ours = model(**given)[0].float(), engine.transformer(**given)[0].float()
    apart = float((ours - theirs).norm() / theirs.norm())
    print(f"||ours - diffusers BF16|| / ||diffusers BF16||: {apart:.2e}", flush=True)


def rollout(engine: Any, config: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Samples a second of a group of 24 with SDE log-probs."""
    draw = torch.Generator().manual_seed(0)
    prompt = Embeds(
        torch.randn(TEXT, config["joint_attention_dim"], generator=draw),
        torch.randn(config["pooled_projection_dim"], generator=draw),
    )
    params = DiffusionParams(
        steps=10, height=512, width=512, n=24, guidance_scale=3.5, init_seed=1, want=("latents:window", "logprobs"),
        solver=FlowSDE(noise_level=0.7, window=(0, 10)),
    )  # fmt: skip
    engine.generate([prompt], params)
    start = time.perf_counter()
    samples = engine.generate([prompt], params)
    seconds = time.perf_counter() - start
    assert all(bool(torch.isfinite(sample.logprobs).all()) for sample in samples)
    print(f"rollout of 24 at 512 x 512, 10 steps: {seconds:.2f} s, {24 / seconds:.2f} samples/s", flush=True)


def swap(engine: Any, config: dict[str, Any]) -> None:
    """The whole model, in one call and while nothing runs."""
    for sign in (-1, 1):
        source = RandomFlux(config, sign=sign)
        torch.cuda.synchronize()
        start = time.perf_counter()
        report = engine.update_weights(iter(source))
        torch.cuda.synchronize()
        total = time.perf_counter() - start
        phases = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in report.seconds.items())
        came = report.bytes_in / 1e9
        print(f"swap: {total * 1e3:.0f} ms of wall; by phase, ms: {phases}; {came:.1f} GB in", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quant", nargs="*", default=["bf16", "fp8_channel"])
    parser.add_argument("--layers", nargs=2, type=int, default=[19, 38])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    for flag in ("peer", "profile", "rollout", "swap", "unfused", "no-graphs", "no-save"):
        parser.add_argument(f"--{flag}", action="store_true")
    arguments = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        config = use_random_weights(Path(folder), num_layers=arguments.layers[0], num_single_layers=arguments.layers[1])
        model = diffusers_model(config) if arguments.peer else None
        if model is not None:
            given = inputs(config, arguments.size, arguments.batch)
            with torch.no_grad():
                times = timed(lambda: model(**given))
            print(f"diffusers eager: {statistics.median(times):.2f} ms ({times[0]:.2f}-{times[-1]:.2f})", flush=True)
        for quant in arguments.quant:
            start = time.perf_counter()
            staged = "staged" if arguments.swap else "streamed"
            graphs = not arguments.no_graphs
            settings = EngineConfig(quant=quant, device="cuda", swap=staged, max_denoise_batch=24, cuda_graphs=graphs)
            engine: Any
            with Engine(folder, settings) as engine:
                if arguments.unfused:
                    engine.transformers["transformer"]._fused = None
                gib = torch.cuda.memory_allocated() / 2**30
                print(f"{quant}: open in {time.perf_counter() - start:.1f} s, {gib:.1f} GiB", flush=True)
                results.append(measure_step(engine, quant, config, arguments))
                if model is not None:
                    compare(engine, model, config, arguments)
                if arguments.profile:
                    given = inputs(config, arguments.size, arguments.batch)
                    profile(lambda given=given, engine=engine: engine.transformer(**given))
                if arguments.rollout:
                    rollout(engine, config, arguments)
                if arguments.swap:
                    swap(engine, config)
            del engine
            gc.collect()
            torch.cuda.empty_cache()
    if not arguments.no_save:
        save("gpu_flux", results)


if __name__ == "__main__":
    main()
