"""FLUX.1-dev's shape on one GPU, random weights: a denoising step, rollouts of a group of 24, swaps of all weights.

    python benchmarks/gpu_flux.py [--quant bf16 fp8_channel fp8_channel+fp8] [--layers 19 38] [--no-peer]
        [--no-rollout] [--profile]

A step is one forward of the transformer as a rollout calls it, everything in it: 1024 x 1024, 512 text tokens, guidance
embedded; "+fp8": with FP8 attention. With CUBLASLT_WORKSPACE_SIZE=0 in the environment a step's name says
no_workspace. Rollouts: 512 x 512, 24 of one prompt, 10 steps, log-probs of all. The peer is diffusers' own model with
the same weights in BF16, called eagerly in the same run; its rollout is its step of 24 times ten. How far our log-probs
are from the peer's, and our velocities, is in the notes: of random weights, which forgive less than trained ones.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from random_flux import RandomFlux, use_random_weights
from record import Result, make_result, save

from rollmill.engine import DiffusionParams, Engine, EngineConfig, FlowSDE
from rollmill.engine.dit.families import Embeds
from rollmill.engine.dit.families.tokens import grid_ids

TEXT, GROUP, STEPS = 512, 24, 10
PUBLISHED = {"bf16": "SGLang 128", "fp8": "flumina 87", "fp8_attn8": "flumina 87"}  # 1024 x 1024, batch 1, H100
LIMITS = {
    "bf16": 106.0,
    "fp8": 70.0,
    "fp8_attn8": 60.7,
}  # ms: products and attention, each as fast as alone in a loop, and nothing else
NAMES = {"fp8_channel": "fp8", "fp8_channel+fp8": "fp8_attn8"}


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
    """GPU time of a step by kernel, of a GPU that is as warm as while steps are timed."""
    from torch.profiler import ProfilerActivity, profile as torch_profile

    timed(step, 20)
    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if "CUDA" in str(event.device_type)]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels) / 1e3
    print(f"profile: {total:.2f} ms of kernels", flush=True)
    for event in kernels[:most]:
        print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:5d} x  {event.key[:110]}", flush=True)


def diffusers_steps(config: dict[str, Any], model: Any) -> dict[tuple[int, int], float]:
    """(size, batch) -> milliseconds of an eager step."""
    found = {}
    for size, batch, repeats in ((1024, 1, 10), (512, 24, 2)):
        given = inputs(config, size, batch)
        with torch.no_grad():
            found[size, batch] = statistics.median(timed(lambda given=given: model(**given), repeats))
        print(f"diffusers eager, {size} batch {batch}: {found[size, batch]:.1f} ms", flush=True)
    return found


def measure_step(engine: Any, name: str, config: dict[str, Any], model: Any, theirs: float | None) -> Result:
    given = inputs(config, 1024, 1)
    times = timed(lambda: engine.transformer(**given), 20)
    note = f"1024 x 1024, batch 1; {times[0]:.1f}-{times[-1]:.1f}; published: {PUBLISHED[name]}"
    if model is not None:
        with torch.no_grad():
            expected, found = model(**given)[0].float(), engine.transformer(**given)[0].float()
        note += f"; ||velocity - peer's|| / ||peer's|| {float((found - expected).norm() / expected.norm()):.1e}"
    suffix = "_no_workspace" if os.environ.get("CUBLASLT_WORKSPACE_SIZE") == "0" else ""
    return shown(f"flux1_{name}{suffix}_step_ms", statistics.median(times), "ms", LIMITS[name], theirs, note)


def shown(name: str, value: float, unit: str, limit: float | None, peer: float | None, note: str) -> Result:
    print(f"{name}: {value:.4g} {unit} (limit {limit}, peer {peer}); {note}", flush=True)
    peer_name = None if peer is None else "diffusers 0.42.1, eager, BF16, same run"
    return make_result(name, value, unit, limit=limit, peer=peer, peer_name=peer_name, note=note)


def measure_rollout(engine: Any, name: str, config: dict[str, Any], model: Any, theirs: float | None) -> Result:
    """Samples a second of a group of 24 with SDE log-probs."""
    draw = torch.Generator().manual_seed(0)
    prompt = Embeds(
        torch.randn(TEXT, config["joint_attention_dim"], generator=draw),
        torch.randn(config["pooled_projection_dim"], generator=draw),
    )
    params = DiffusionParams(
        steps=STEPS, height=512, width=512, n=GROUP, guidance_scale=3.5, init_seed=1, step_seed=2,
        want=("latents", "logprobs"), solver=FlowSDE(noise_level=0.7, window=(0, STEPS)),
    )  # fmt: skip
    engine.generate([prompt], msgspec.structs.replace(params, steps=1, solver=FlowSDE(window=(0, 1))))  # captures
    torch.cuda.synchronize()
    start = time.perf_counter()
    samples = engine.generate([prompt], params)
    seconds = time.perf_counter() - start
    assert all(bool(torch.isfinite(sample.logprobs).all()) for sample in samples)
    note = f"{GROUP} at 512 x 512, {STEPS} steps, log-probs of all: {seconds:.2f} s"
    if model is not None:
        apart = logprob_distances(engine, model, samples)
        note += f"; |logprob - peer's| of 4 samples, mean {apart.mean():.1e}, max {apart.max():.1e}"
    peer = None if theirs is None else GROUP / (STEPS * theirs / 1e3)
    suffix = "" if name == "fp8" else f"_{name}"
    return shown(f"dit_rollout_512{suffix}_sps", GROUP / seconds, "samples/s", None, peer, note)


def logprob_distances(engine: Any, model: Any, samples: list[Any]) -> torch.Tensor:
    """|log-prob of the rollout - log-prob that diffusers' model gives the same latents|, of some samples and steps."""
    few, found = samples[:4], []
    for step in range(0, STEPS, 3):
        given = {
            name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in engine.step_inputs(few, step).items()
        }
        with torch.no_grad():
            velocity = model(**given, return_dict=False)[0].float()
        for sample, one in zip(few, velocity, strict=True):
            theirs = sample.step_logprob(step, one.to(sample.latents.device))
            found.append(abs(float(theirs) - float(sample.logprobs[step])))
    return torch.tensor(found)


def measure_swaps(engine: Any, name: str, config: dict[str, Any]) -> list[Result]:
    """The whole model from tensors on the same GPU, staged, in one call; the pause is the commit."""
    reports = []
    for sign in (-1, 1, -1):
        source = RandomFlux(config, sign=sign)
        torch.cuda.synchronize()
        start = time.perf_counter()
        report = engine.update_weights(iter(source))
        torch.cuda.synchronize()
        reports.append((time.perf_counter() - start, report))
        del source
    seconds, report = sorted(reports, key=lambda one: one[0])[1]
    phases = ", ".join(f"{phase} {part * 1e3:.0f}" for phase, part in report.seconds.items())
    pause = statistics.median(report.seconds["pause"] for _, report in reports)
    note = f"{report.bytes_in / 1e9:.1f} GB of BF16 in, staged; by phase, ms: {phases}"
    return [
        shown(f"flux1_{name}_swap_ms", seconds * 1e3, "ms", None, None, note),
        shown(f"flux1_{name}_swap_pause_ms", pause * 1e3, "ms", None, None, "copy of all packed bytes"),
    ]


def measure(quant: str, folder: str, config: dict[str, Any], model: Any, arguments: argparse.Namespace) -> list[Result]:
    name, theirs = NAMES.get(quant, quant), arguments.theirs
    start = time.perf_counter()
    quant, _, attention = quant.partition("+")
    settings = EngineConfig(
        quant=quant,  # pyright: ignore[reportArgumentType]
        attention=attention or "auto",  # pyright: ignore[reportArgumentType]
        device="cuda",
        max_denoise_batch=GROUP,
        swap="staged" if name == "fp8" else "streamed",
    )
    engine: Any
    with Engine(folder, settings) as engine:
        gib = torch.cuda.memory_allocated() / 2**30
        print(f"{name}: open in {time.perf_counter() - start:.1f} s, {gib:.1f} GiB", flush=True)
        results = [measure_step(engine, name, config, model, theirs.get((1024, 1)))]
        if arguments.profile:
            given = inputs(config, 1024, 1)
            profile(lambda: engine.transformer(**given))
        if not arguments.no_rollout:
            results.append(measure_rollout(engine, name, config, model, theirs.get((512, GROUP))))
        if name == "fp8":
            results += measure_swaps(engine, name, config)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quant", nargs="*", default=["fp8_channel", "bf16", "fp8_channel+fp8"])
    parser.add_argument("--layers", nargs=2, type=int, default=[19, 38])
    for flag in ("no-peer", "no-rollout", "profile", "no-save"):
        parser.add_argument(f"--{flag}", action="store_true")
    arguments = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        config = use_random_weights(Path(folder), num_layers=arguments.layers[0], num_single_layers=arguments.layers[1])
        model = None if arguments.no_peer else diffusers_model(config)
        arguments.theirs = {} if model is None else diffusers_steps(config, model)
        for quant in arguments.quant:
            results += measure(quant, folder, config, model, arguments)
            gc.collect()
            torch.cuda.empty_cache()
            if not arguments.no_save:
                save("gpu_flux", results)


if __name__ == "__main__":
    main()
