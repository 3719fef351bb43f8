"""What quantization costs a diffusion transformer's rollouts, through the engine; and whether the demo's policy learns.

Model: FLUX.1's architecture at 2.3 M parameters, trained on scikit-learn's digits (`rollmill demo dit`). 240 samples
of 10 steps, drawn in FP8 and in NVFP4 (scales per token, ModelOpt's layers kept in BF16) and once more in BF16 from
the same noise, by Flow-GRPO's SDE at noise level 0.7. Judge: share of images that are read as their digit. Spearman,
overlap: of rewards (mean ink of a right digit), and of the best quarters. dlogp: mean |log-prob under BF16 weights -
returned log-prob| of the stored trajectories, each the mean over a latent's elements.
Limit: the bar; of the judge, two points below BF16.
Peer: an emulation in float32 on a smaller DiT of the same digits, FP8 with static scales, everything with noise.
`dit_demo_reward_gain_se`: (mean reward of the demo's last 3 steps - of its first 3) / standard error, over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from math import sqrt
from pathlib import Path
from typing import get_args

import msgspec
import torch
from record import Result, make_result, save

from rollmill.engine import EngineConfig
from rollmill.engine.demo.dit.config import DitDemoConfig, Quant
from rollmill.engine.demo.dit.digits import NUM_CLASSES
from rollmill.engine.demo.dit.judge import Judge
from rollmill.engine.demo.dit.measures import psnr, rank_correlation, top_overlap
from rollmill.engine.demo.dit.model import build_model
from rollmill.engine.demo.dit.prompts import embeds_of
from rollmill.engine.demo.dit.run import run_dit_demo
from rollmill.engine.demo.dit.trainer import load_flux
from rollmill.engine.demo.dit.trajectories import Trajectories, collect, recompute_logprobs
from rollmill.engine.dit.engine import DiffusionEngine
from rollmill.engine.env import cache_home

PEER = "float32 emulation"
BAR = 2.0  # standard errors


class Bars(msgspec.Struct, frozen=True):
    """What a format is held against: (limit, peer) of every figure; a limit of None: no bar."""

    judge_peer: float
    spearman: tuple[float, float]
    overlap: tuple[float | None, float]
    dlogp_peer: float


BARS: dict[Quant, Bars] = {
    "fp8": Bars(100.0, (0.99, 0.9989), (None, 98.0), 1.2e-3),
    "nvfp4": Bars(100.0, (0.97, 0.9913), (85.0, 92.0), 4.6e-3),
}


def draw(folder: Path, quant: Quant, config: DitDemoConfig, per_digit: int) -> tuple[Trajectories, Trajectories]:
    """(quantized, BF16) trajectories of every digit from the same noise."""
    wish = EngineConfig(quant=quant, activation="per_token", dual="bf16", dtype="float32", max_denoise_batch=80)
    digits = range(NUM_CLASSES)
    with DiffusionEngine(folder, wish) as engine:
        params = config.params(per_digit, init_seed=0, step_seed=1_000_000)
        samples = engine.generate([embeds_of(digit) for digit in digits], params)
        again = engine.replay(samples, precision="bf16")
    return collect(samples, digits), collect(again, digits)


def results_of(quant: Quant, found: Trajectories, bf16: Trajectories, judge: Judge, gaps: torch.Tensor) -> list[Result]:
    """The four figures of a format; `gaps` are |differences of log-probs| [samples, steps]."""
    bars, count = BARS[quant], len(found.labels)
    rewards, references = (judge.rewards(one.ink, one.labels) for one in (found, bf16))
    right, right_bf16 = (judge.right(one.ink, one.labels) for one in (found, bf16))
    accuracy, accuracy_bf16 = (100 * one.float().mean().item() for one in (right, right_bf16))
    decibels = psnr(found.latents[:, -1], bf16.latents[:, -1])
    error = (found.latents[:, -1] - bf16.latents[:, -1]).norm() / bf16.latents[:, -1].norm()
    same = f"{count} samples, {len(found.steps)} steps; "
    both = right & right_bf16
    notes = {
        "judge": f"{same}BF16 {accuracy_bf16:.2f} %; read otherwise than in BF16: {int((right != right_bf16).sum())}; "
        f"images differ by {error:.1%}, PSNR {decibels.median():.1f} dB (least {decibels.min():.1f})",
        "spearman": f"{same}{rank_correlation(rewards[both], references[both]):.4f} over digits right in both; "
        f"mean reward {rewards.mean():.4f}, BF16 {references.mean():.4f}",
        "dlogp": f"{same}largest {gaps.max():.1e}; by step " + ", ".join(f"{gap:.1e}" for gap in gaps.mean(0).tolist()),
    }
    rows = (
        ("judge", accuracy, "% right", accuracy_bf16 - 2, bars.judge_peer),
        ("spearman", rank_correlation(rewards, references), "rank correlation", *bars.spearman),
        ("overlap", 100 * top_overlap(rewards, references), "% of the best quarter", *bars.overlap),
        ("dlogp", gaps.mean().item(), "mean difference", None, bars.dlogp_peer),
    )
    return [
        make_result(
            f"dit_{name}_{quant}", value, unit, limit=limit, peer=peer, peer_name=PEER, note=notes.get(name, same[:-2])
        )
        for name, value, unit, limit, peer in rows
    ]


def measure_formats(folder: Path, config: DitDemoConfig, per_digit: int) -> list[Result]:
    judge, model, results = Judge(), load_flux(folder), []
    for quant in get_args(Quant):
        found, bf16 = draw(folder, quant, config, per_digit)
        own = (recompute_logprobs(model, bf16) - bf16.logprobs).abs().max()
        print(f"{quant}: BF16's own log-probs, recomputed by diffusers' module: within {own:.1e}")
        results += results_of(quant, found, bf16, judge, (recompute_logprobs(model, found) - found.logprobs).abs())
    for result in results:
        print(f"{result.name}: {result.value:.4g} {result.unit}; {result.note}", flush=True)
    return results


def measure_gain(seeds: int, steps: int, out: Path, cache: Path) -> Result:
    """The demo's reward gain over seeds, in standard errors."""
    gains, rights, seconds = [], [], []
    for seed in range(seeds):
        history = run_dit_demo(DitDemoConfig(seed=seed, steps=steps), out=out / f"seed-{seed}", cache=cache)
        rewards = [step.reward for step in history.steps]
        gains.append(statistics.fmean(rewards[-3:]) - statistics.fmean(rewards[:3]))
        rights.append(statistics.fmean(step.right for step in history.steps[-3:]))
        seconds.append(history.total_seconds)
        print(f"seed {seed}: gain {gains[-1]:.3f}, {seconds[-1]:.0f} s", [f"{r:.2f}" for r in rewards], flush=True)
    error = statistics.stdev(gains) / sqrt(len(gains))
    listed = ", ".join(f"{gain:+.3f}" for gain in gains)
    note = f"{seeds} seeds, {steps} steps; gains {listed}; right at the end {statistics.fmean(rights):.0%}; "
    note += f"{max(seconds):.0f} s a run at the most"
    gain = statistics.fmean(gains) / error
    return make_result("dit_demo_reward_gain_se", gain, "standard errors", limit=BAR, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-digit", type=int, default=24)
    parser.add_argument("--denoising-steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("demo-output") / "dit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = Path(cache_home()) / "rollmill"
    config = DitDemoConfig(denoising_steps=arguments.denoising_steps)
    results = measure_formats(build_model(cache, print, config.recipe), config, arguments.per_digit)
    save("dit_digits", [*results, measure_gain(arguments.seeds, arguments.steps, arguments.out, cache)])


if __name__ == "__main__":
    main()
