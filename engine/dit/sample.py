"""What a diffusion rollout gives back."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from torch import Tensor

from ..errors import RequestError
from .families import Embeds, Size
from .params import ODE, DiffusionParams
from .solvers import Step, log_density, make_steps


class Seeds(Struct, frozen=True):
    """`init` draws the first latent, `step` the noise of the steps; on every machine and in every company the same."""

    init: int
    step: int


class DiffusionSample(Struct, frozen=True):
    """One sample of one prompt.

    `latents`: [len(points), *latent shape] as the transformer takes them, in `params.latents_dtype`, in memory of their
    own; `points` are their places among the steps + 1 of the trajectory, point 0 being noise. `window`: the steps
    drawn, half-open; `logprobs` and `stds` float32 [len(window)], `means` [len(window), *latent shape]: `latent(i + 1)`
    ~ Normal(mean, std) at step i, with the density that `params.solver.log_density` names, of the latent as stored.
    `sigmas` float32 [steps + 1] and `timesteps` [steps] as used. `precisions`: of every step. `image`: uint8 [height,
    width, 3], with frames in front for a video. `embeds` is shared by a group. `params` are those of the call, with the
    size and the guidance that were left open filled in; `params`, `embeds` and `seeds` give the sample again
    (`replay`).
    """

    prompt_index: int
    latents: Tensor
    points: Sequence[int]
    window: range
    logprobs: Tensor | None
    stds: Tensor
    means: Tensor | None
    sigmas: Tensor
    timesteps: Tensor
    precisions: Sequence[str]
    image: Tensor | None
    embeds: Embeds
    seeds: Seeds
    size: Size
    weight_version: str
    params: DiffusionParams

    def latent(self, point: int) -> Tensor:
        """The latent at one of `points`, [*latent shape]: `latent(i)` goes into step i, `latent(i + 1)` comes out."""
        if point not in self.points:
            raise RequestError(f"latents of point {point} were not kept, only of {list(self.points)}; see `want`")
        return self.latents[self.points.index(point)]

    def step_mean(self, step: int, velocity: Tensor) -> Tensor:
        """float32 [*latent shape]: the mean of the latent behind drawn step `step`, from a trainer's `velocity` there.

        `velocity` [*latent shape]: what the transformer returned for `latent(step)`, guided as it was in the rollout.
        Gradients flow.
        """
        return self._step(step).mean(self.latent(step).float(), velocity.float())

    def step_logprob(self, step: int, velocity: Tensor) -> Tensor:
        """float32 []: the log-prob of `latent(step + 1)` under a trainer's `velocity`: `logprobs` where it is ours."""
        mean, std = self.step_mean(step, velocity), self._step(step).std
        assert not isinstance(self.params.solver, ODE)
        return log_density(self.latent(step + 1).float()[None], mean[None], std, self.params.solver.log_density)[0]

    def _step(self, step: int) -> Step:
        if step not in self.window:
            raise RequestError(f"step {step} was not drawn; drawn: {list(self.window)}")
        return make_steps(self.params.solver, self.sigmas.tolist(), self.window)[step]


class Exploration(Struct, frozen=True):
    """One prompt's pool, ranked: `rewards` float32 [pool]; `best` and `worst` are places in the pool, the best first
    and the worst first; `samples` are those, best ones in front, computed again in the precision asked for."""

    rewards: Tensor
    best: Sequence[int]
    worst: Sequence[int]
    samples: Sequence[DiffusionSample]
