"""What quantization costs a diffusion transformer's rollouts, through the engine; and whether the demo's policy learns.

Model: FLUX.1's architecture at 2.3 M parameters, trained on scikit-learn's digits (`rollmill demo dit`). 240 samples
of 10 steps by Flow-GRPO's SDE at noise level 0.7, drawn in FP8 and in NVFP4 (scales per token, ModelOpt's layers kept
in BF16) and once more in BF16 from the same noise; figures are medians over several such draws. Judge: share of images
that are read as their digit. Spearman, overlap: of rewards (mean ink of a right digit), and of the best quarters.
dlogp: mean |log-prob under BF16 weights - returned log-prob| of the stored trajectories, each the mean over a latent's
elements.
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


class Drawn(msgspec.Struct, frozen=True):
    """One draw in a format, and in BF16 from the same noise; `gaps`: |differences of log-probs| [samples, steps]."""

    found: Trajectories
    bf16: Trajectories
    gaps: torch.Tensor


def draw(folder: Path, quant: Quant, config: DitDemoConfig, per_digit: int, draws: int) -> list[Drawn]:
    """`draws` times `per_digit` samples of every digit; every draw has noise of its own, the same in all formats."""
    wish = EngineConfig(quant=quant, activation="per_token", dual="bf16", dtype="float32", max_denoise_batch=80)
    digits, model, drawn = range(NUM_CLASSES), load_flux(folder), []
    with DiffusionEngine(folder, wish) as engine:
        for start in range(0, 1000 * draws, 1000):
            params = config.params(per_digit, init_seed=start, step_seed=1_000_000 + start)
            samples = engine.generate([embeds_of(digit) for digit in digits], params)
            found, bf16 = (collect(one, digits) for one in (samples, engine.replay(samples, precision="bf16")))
            own = (recompute_logprobs(model, bf16) - bf16.logprobs).abs().max()
            print(f"{quant}: log-probs of BF16 and of diffusers' own module agree to {own:.1e}", flush=True)
            drawn.append(Drawn(found, bf16, (recompute_logprobs(model, found) - found.logprobs).abs()))
    return drawn


def figures_of(one: Drawn, judge: Judge) -> dict[str, float]:
    """Everything that one draw says."""
    found, bf16 = one.found, one.bf16
    rewards, references = (judge.rewards(each.ink, each.labels) for each in (found, bf16))
    right, right_bf16 = (judge.right(each.ink, each.labels) for each in (found, bf16))
    both = right & right_bf16
    last, last_bf16 = found.latents[:, -1], bf16.latents[:, -1]
    return {
        "judge": 100 * right.float().mean().item(),
        "judge_bf16": 100 * right_bf16.float().mean().item(),
        "flips": (right != right_bf16).sum().item(),
        "spearman": rank_correlation(rewards, references),
        "spearman_both": rank_correlation(rewards[both], references[both]),
        "overlap": 100 * top_overlap(rewards, references),
        "dlogp": one.gaps.mean().item(),
        "largest": one.gaps.max().item(),
        "error": 100 * ((last - last_bf16).norm() / last_bf16.norm()).item(),
        "psnr": psnr(last, last_bf16).median().item(),
    }


def results_of(quant: Quant, drawn: list[Drawn], judge: Judge) -> list[Result]:
    """The four figures of a format, medians over the draws."""
    bars, figures = BARS[quant], [figures_of(one, judge) for one in drawn]
    middle = {name: statistics.median(one[name] for one in figures) for name in figures[0]}
    steps = torch.stack([one.gaps.mean(0) for one in drawn]).mean(0).tolist()
    notes = {
        "judge": f"BF16 {middle['judge_bf16']:.2f} %; read otherwise than in BF16: "
        f"{', '.join(str(int(one['flips'])) for one in figures)} a draw; images differ by {middle['error']:.1f} %, "
        f"PSNR {middle['psnr']:.1f} dB",
        "spearman": f"{middle['spearman_both']:.4f} over digits right in both",
        "overlap": "",
        "dlogp": f"largest {max(one['largest'] for one in figures):.1e}; by step "
        + ", ".join(f"{gap:.1e}" for gap in steps),
    }
    rows = (
        ("judge", "% right", middle["judge_bf16"] - 2, bars.judge_peer),
        ("spearman", "rank correlation", *bars.spearman),
        ("overlap", "% of the best quarter", *bars.overlap),
        ("dlogp", "mean difference", None, bars.dlogp_peer),
    )
    results = []
    for name, unit, limit, peer in rows:
        values = [one[name] for one in figures]
        note = (
            f"{len(drawn)} draws of {len(drawn[0].found.labels)}: {min(values):.4g}..{max(values):.4g}; {notes[name]}"
        )
        results.append(
            make_result(
                f"dit_{name}_{quant}",
                middle[name],
                unit,
                limit=limit,
                peer=peer,
                peer_name=PEER,
                note=note.removesuffix("; "),
            )
        )
    return results


def measure_formats(folder: Path, config: DitDemoConfig, per_digit: int, draws: int) -> list[Result]:
    results = []
    for quant in get_args(Quant):
        results += results_of(quant, draw(folder, quant, config, per_digit, draws), Judge())
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
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--denoising-steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("demo-output") / "dit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = Path(cache_home()) / "rollmill"
    config = DitDemoConfig(denoising_steps=arguments.denoising_steps)
    folder = build_model(cache, print, config.recipe)
    results = measure_formats(folder, config, arguments.per_digit, arguments.draws)
    save("dit_digits", [*results, measure_gain(arguments.seeds, arguments.steps, arguments.out, cache)])


if __name__ == "__main__":
    main()
