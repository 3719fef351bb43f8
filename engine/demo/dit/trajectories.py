"""Samples of an engine as the tensors that a trainer learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor

from ...dit.params import FlowSDE
from ...dit.sample import DiffusionSample
from ...dit.solvers import Step, log_density, make_steps
from .digits import to_ink
from .model import unpack, velocity


class Trajectories(Struct, frozen=True):
    """Whole trajectories, samples of a prompt side by side.

    `latents`: float32 [samples, steps + 1, 16, 4]; `labels`: int64 [samples]; `logprobs`: float32 [samples, steps],
    of the policy that drew them; `sigmas`: float32 [steps + 1].
    """

    latents: Tensor
    labels: Tensor
    logprobs: Tensor
    sigmas: Tensor
    noise_level: float
    group: int  # samples a prompt

    @property
    def steps(self) -> list[Step]:
        return make_steps(FlowSDE(noise_level=self.noise_level), self.sigmas.tolist(), range(len(self.sigmas) - 1))

    @property
    def ink(self) -> Tensor:
        """The images, float32 [samples, 8, 8] in 0 to 1."""
        return final_ink(self.latents[:, -1])


def collect(samples: Sequence[DiffusionSample], digits: Sequence[int]) -> Trajectories:
    """Trajectories of samples that were drawn at all steps with all latents wanted; `digits` are the prompts."""
    first, solver = samples[0], samples[0].params.solver
    assert isinstance(solver, FlowSDE)
    assert len(first.window) == first.params.steps == len(first.points) - 1
    logprobs = [sample.logprobs for sample in samples if sample.logprobs is not None]
    return Trajectories(
        latents=torch.stack([sample.latents for sample in samples]).float().cpu(),
        labels=torch.tensor([digits[sample.prompt_index] for sample in samples]),
        logprobs=torch.stack(logprobs),
        sigmas=first.sigmas,
        noise_level=solver.noise_level,
        group=first.params.n,
    )


def final_ink(latents: Tensor) -> Tensor:
    """The images of final latents [samples, 16, 4], float32 [samples, 8, 8]."""
    return to_ink(unpack(latents))


def step_mean(model: Any, found: Trajectories, step: int) -> Tensor:
    """Where `model` would go from the stored latents at `step`: float32 [samples, 16, 4]."""
    latents, how = found.latents[:, step], found.steps[step]
    sigma = found.sigmas[step].expand(len(latents))
    return latents * how.x + velocity(model, latents, sigma, found.labels).float() * how.v


def step_logprobs(found: Trajectories, step: int, mean: Tensor) -> Tensor:
    """Log-probs of the stored next latents under Normal(mean, std), float32 [samples], means over elements."""
    return log_density(found.latents[:, step + 1], mean, found.steps[step].std, "gaussian")


@torch.no_grad()
def recompute_logprobs(model: Any, found: Trajectories) -> Tensor:
    """What `model` gives to the trajectories as they were drawn, float32 [samples, steps]."""
    steps = range(len(found.steps))
    return torch.stack([step_logprobs(found, step, step_mean(model, found, step)) for step in steps], 1)
