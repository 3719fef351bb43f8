"""`DiffusionRollouts`: denoises batches of samples, a whole trajectory between two swaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from msgspec import Struct
from msgspec.structs import replace
from torch import Tensor

from ...quant import ModelError
from ..errors import RequestError
from .families import Embeds, Family, Size
from .params import ODE, DiffusionParams, Solver, step_precisions, window_steps
from .sample import DiffusionSample, Seeds
from .schedule import Schedule, make_schedule
from .solvers import StepNoise, draw_noise, log_density, make_steps
from .transformer import Transformer
from .turns import Turns

SHARE = 16384  # elements that torch leaves to one thread; other operators than GELU do so with 32768


class Wanted(Struct, frozen=True):
    """One sample to make."""

    prompt_index: int
    embeds: Embeds
    seeds: Seeds


class Call(Struct, frozen=True):
    """What all samples of one call have in common."""

    params: DiffusionParams
    size: Size
    guidance: float | None
    cfg: tuple[float, float] | None  # true CFG of the transformer, and of the second one
    schedule: Schedule
    window: range
    precisions: Sequence[str]


class Trajectory:
    """Collects what a batch of samples is to bring back."""

    def __init__(self, call: Call) -> None:
        self.points = _points(call)
        self.with_means = "means" in call.params.want
        self.last = torch.empty(0)
        self.latents: list[Tensor] = []
        self.means: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.stds: list[float] = []

    def keep(self, point: int, latents: Tensor) -> None:
        self.last = latents
        if point in self.points:
            self.latents.append(latents)

    def drawn(self, mean: Tensor, std: float, logprob: Tensor) -> None:
        self.logprobs.append(logprob)
        self.stds.append(std)
        if self.with_means:
            self.means.append(mean)


def _points(call: Call) -> tuple[int, ...]:
    """Of the trajectory, those whose latents come back."""
    steps, window, want = call.params.steps, call.window, call.params.want
    if "latents" in want:
        return tuple(range(steps + 1))
    around = range(window.start, window.stop + 1) if "latents:window" in want and window else range(0)
    final = [steps] if "latents:final" in want or not around else []
    return tuple(sorted({*around, *final}))


class DiffusionRollouts:
    """The transformers of a policy, and the loop over their steps.

    A trajectory is computed from one version of the weights: swaps wait for the batch under way. Samples of equal
    shapes are computed `max_batch` at a time. On a CPU none depends on which others are in its batch; on a GPU
    libraries may choose another order of sums for another number of tokens, and nothing is claimed.
    """

    def __init__(
        self,
        transformers: Mapping[str, Transformer],
        family: Family,
        scheduler: Any,
        turns: Turns,
        *,
        max_batch: int,
        boundary: float | None,
    ) -> None:
        self.transformers, self.family, self.scheduler = dict(transformers), family, scheduler
        self.turns, self.max_batch, self.boundary = turns, max_batch, boundary
        self.first = next(iter(self.transformers.values()))
        if boundary is not None and len(self.transformers) < 2:
            raise ModelError("the pipeline names a boundary_ratio between two transformers, and holds one only")

    # calls

    def plan(self, params: DiffusionParams, guidance: float | None, cfg: tuple[float, float] | None) -> Call:
        """Work out everything that the samples of a call share; errors come before anything is computed."""
        if params.true_cfg_scale_2 is not None and self.boundary is None:
            raise RequestError("true_cfg_scale_2 is for a second transformer, and this pipeline has none")
        size = self.family.size(params)
        params = replace(params, height=size.height, width=size.width, guidance_scale=guidance)
        mu = self.family.mu(self.scheduler, size, params.steps)
        schedule = make_schedule(self.scheduler, params, mu, linear=self.family.LINEAR_SIGMAS)
        window = window_steps(params.solver, params.steps, params.training_step)
        named = step_precisions(params.precision, params.steps, window)
        known = {name: self.resolve_precision(name) for name in named}
        precisions = [
            known[name][self._is_second(now)] for name, now in zip(named, schedule.timesteps.tolist(), strict=True)
        ]
        return Call(params, size, guidance, cfg, schedule, window, precisions)

    def resolve_precision(self, name: str) -> list[str]:
        """What each transformer's linears call precision `name`; `ConfigError` if one cannot compute in it."""
        return [transformer.resolve_precision(name) for transformer in self.transformers.values()]

    def _is_second(self, timestep: float) -> bool:
        """Whether it is of low noise, where there is a transformer for that."""
        return self.boundary is not None and timestep < self.boundary

    @torch.no_grad()
    def run(
        self,
        call: Call,
        wanted: Sequence[Wanted],
        decode: Callable[[Call, Tensor], Tensor] | None,
        on_batch: Callable[[int], None],
    ) -> list[DiffusionSample]:
        """All samples, in the order asked for, with the images that `decode` makes of their last latents [1, ...].

        `on_batch` hears of every batch, how many samples it had.
        """
        done: dict[int, DiffusionSample] = {}
        for places in self._batches(wanted):
            trajectory, samples = self._run_batch(call, [wanted[place] for place in places])
            if decode is not None:  # one by one: a VAE wants much memory, and on a CPU no image depends on its company
                images = [decode(call, last[None])[0] for last in trajectory.last]
                samples = [replace(sample, image=image) for sample, image in zip(samples, images, strict=True)]
            done |= zip(places, samples, strict=True)
            on_batch(len(places))
        return [done[place] for place in range(len(wanted))]

    def _batches(self, wanted: Sequence[Wanted]) -> Iterator[list[int]]:
        """Places of samples whose embeds have equal shapes, `max_batch` at a time."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, one in enumerate(wanted):
            alike.setdefault(_shapes(one.embeds), []).append(place)
        for places in alike.values():
            for start in range(0, len(places), self.max_batch):
                yield places[start : start + self.max_batch]

    # one batch

    def _run_batch(self, call: Call, batch: Sequence[Wanted]) -> tuple[Trajectory, list[DiffusionSample]]:
        with self.turns.batch() as version:
            trajectory = self._denoise(call, batch)
            return trajectory, list(self._samples(call, batch, trajectory, version))

    def _denoise(self, call: Call, batch: Sequence[Wanted]) -> Trajectory:
        params, held = call.params, getattr(torch, call.params.latents_dtype)
        device, shape = self.first.capability.device, self.family.noise_shape(call.size)
        latents = self.family.pack(draw_noise([one.seeds.init for one in batch], shape).to(device)).to(held)
        step_noise = StepNoise([one.seeds.step for one in batch], shape)
        trajectory = Trajectory(call)
        trajectory.keep(0, latents)
        for i, step in enumerate(make_steps(params.solver, call.schedule.sigmas.tolist(), call.window)):
            velocity = self._velocity(call, i, latents, [one.embeds for one in batch]).float()
            mean = step.mean(latents.float(), velocity)
            if i in call.window:
                noise = self.family.pack(step_noise.draw(i).to(device))
                latents = (mean + noise * step.std).to(held)
                density = _density(params.solver, latents.float(), mean, step.std)
                trajectory.drawn(mean, step.std, density)
            else:
                latents = mean.to(held)
            trajectory.keep(i + 1, latents)
        return trajectory

    def _velocity(self, call: Call, step: int, latents: Tensor, embeds: Sequence[Embeds]) -> Tensor:
        now = call.schedule.timesteps[step]
        timestep = now.to(latents.device).expand(len(latents))
        second = self._is_second(float(now))
        transformer = list(self.transformers.values())[second]  # high noise, low noise
        with self.first.switch.at(call.precisions[step]):
            velocity = self._forward(transformer, call, latents, timestep, embeds)
            if call.cfg is None:
                return velocity
            negative = [one.negative for one in embeds if one.negative is not None]
            without = self._forward(transformer, call, latents, timestep, negative)
        return self.family.guide(velocity, without, call.cfg[second])

    def _forward(
        self, transformer: Transformer, call: Call, latents: Tensor, timestep: Tensor, embeds: Sequence[Embeds]
    ) -> Tensor:
        count = self._num_together(call, transformer, embeds)
        outs: list[Tensor] = []
        for start in range(0, len(latents), count):
            part = slice(start, start + count)
            now = latents[part].to(transformer.dtype)
            inputs = self.family.inputs(now, timestep[part], embeds[part], call.size, call.guidance)
            outs.append(transformer.module(**inputs, return_dict=False)[0])
        return torch.cat(outs)

    def _num_together(self, call: Call, transformer: Transformer, embeds: Sequence[Embeds]) -> int:
        """How many samples one forward may hold.

        On a CPU torch splits elementwise work over threads by the size of the whole batch, and computes the remainder
        of every share with other instructions than the rest. One thread has no such shares, two have no remainder.
        """
        if transformer.capability.device.type != "cpu" or torch.get_num_threads() <= 2:
            return len(embeds)
        num_tokens = self.family.num_tokens(call.size) + max(len(one.prompt) for one in embeds)
        return max(1, SHARE // (num_tokens * transformer.width))

    def _samples(
        self, call: Call, batch: Sequence[Wanted], trajectory: Trajectory, version: str
    ) -> Iterator[DiffusionSample]:
        logprobs = torch.stack(trajectory.logprobs, 1).cpu() if trajectory.logprobs else None
        for i, one in enumerate(batch):
            yield DiffusionSample(
                prompt_index=one.prompt_index,
                latents=torch.stack([latents[i] for latents in trajectory.latents]),  # memory of its own
                points=trajectory.points,
                window=call.window,
                logprobs=logprobs[i].clone() if logprobs is not None and "logprobs" in call.params.want else None,
                stds=torch.tensor(trajectory.stds, dtype=torch.float32),
                means=torch.stack([mean[i] for mean in trajectory.means]) if trajectory.means else None,
                sigmas=call.schedule.sigmas,
                timesteps=call.schedule.timesteps,
                precisions=call.precisions,
                image=None,
                embeds=one.embeds,
                seeds=one.seeds,
                size=call.size,
                weight_version=version,
                params=call.params,
            )


def _shapes(embeds: Embeds) -> tuple[Any, ...]:
    parts = [None if part is None else tuple(part.shape) for part in (embeds.prompt, embeds.pooled, embeds.mask)]
    return (*parts, None if embeds.negative is None else _shapes(embeds.negative))


def _density(solver: Solver, latents: Tensor, mean: Tensor, std: float) -> Tensor:
    assert not isinstance(solver, ODE)
    return log_density(latents, mean, std, solver.log_density)
