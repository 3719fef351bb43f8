"""The trained policy in every precision, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...report.dit.history import Comparison, FormatResult, Picture, Pixels
from .judge import Judge
from .measures import psnr, rank_correlation, top_overlap
from .trajectories import Trajectories, recompute_logprobs

NAMES = {"nvfp4": "NVFP4", "fp8": "FP8"}


def compare(model: Any, judge: Judge, bf16: Trajectories, formats: dict[str, Trajectories]) -> Comparison:
    """`formats`: quant -> its samples of `bf16`'s noise; `model` gives log-probs in BF16 weights."""
    return Comparison(
        bf16=make_pictures(bf16, judge),
        bf16_right=judge.right(bf16.ink, bf16.labels).float().mean().item(),
        formats=[compare_format(quant, model, judge, bf16, found) for quant, found in formats.items()],
    )


def compare_format(quant: str, model: Any, judge: Judge, bf16: Trajectories, found: Trajectories) -> FormatResult:
    """One format's images, rewards and log-probs against BF16's."""
    gaps = (recompute_logprobs(model, found) - found.logprobs).abs()
    rewards, references = (judge.rewards(one.ink, one.labels) for one in (found, bf16))
    return FormatResult(
        name=NAMES[quant],
        pictures=make_pictures(found, judge),
        psnr=psnr(found.latents[:, -1], bf16.latents[:, -1]).tolist(),
        right=judge.right(found.ink, found.labels).float().mean().item(),
        rank_correlation=rank_correlation(rewards, references),
        top_overlap=top_overlap(rewards, references),
        logprob_gap=gaps.mean(0).tolist(),
        largest_gap=gaps.max().item(),
    )


def make_pictures(found: Trajectories, judge: Judge) -> list[Picture]:
    """The images with the rewards that the judge gives them."""
    rewards, digits = judge.rewards(found.ink, found.labels).tolist(), found.labels.tolist()
    return [Picture(*parts) for parts in zip(digits, rewards, to_pixels(found.ink), strict=True)]


def to_pixels(ink: Tensor) -> Sequence[Pixels]:
    """Ink [images, 8, 8] in 0 to 1 -> 64 bytes an image."""
    return [bytes(image) for image in (ink * 255).round().long().flatten(1).tolist()]
