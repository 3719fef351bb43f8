"""One sample's way from noise to a digit, as the model saw it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dit.params import FlowSDE
from ...dit.sample import DiffusionSample
from ...dit.solvers import make_steps
from ...report.dit.history import Strip
from .compare import to_pixels
from .trajectories import final_ink


def clean_predictions(sample: DiffusionSample) -> Tensor:
    """What the model took the clean latents to be at every step: latent - sigma * velocity, float32 [steps, 16, 4].

    `sample` brings all latents, and the means of its drawn steps: a step is linear in latent and velocity.
    """
    assert sample.means is not None
    assert isinstance(sample.params.solver, FlowSDE)
    steps = make_steps(sample.params.solver, sample.sigmas.tolist(), sample.window)
    predictions = []
    for i, step in enumerate(steps):
        mean = sample.means[i - sample.window.start] if i in sample.window else sample.latents[i + 1].float()
        velocity = (mean - sample.latents[i].float() * step.x) / step.v
        predictions.append(sample.latents[i].float() - sample.sigmas[i] * velocity)
    return torch.stack(predictions).cpu()


def make_strip(name: str, digit: int, sample: DiffusionSample, quant: str) -> Strip:
    """The strip of one sample; `quant` is what "quantized" stands for."""
    shown = torch.cat([clean_predictions(sample), sample.latents[-1:].float().cpu()])
    return Strip(
        name=name,
        digit=digit,
        window=(sample.window.start, sample.window.stop),
        precisions=[quant if one == "quantized" else one for one in sample.precisions],
        sigmas=sample.sigmas.tolist(),
        pictures=list(to_pixels(final_ink(shown))),
    )
