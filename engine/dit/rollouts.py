"""`DiffusionRollouts`: denoises batches of samples, a whole trajectory between two swaps."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor

from ...quant import ConfigError
from ...weight_sync import Policy
from ..errors import ClosedError
from ..step_gate import StepGate
from .families import Embeds, Family, Size
from .params import ODE, DiffusionParams, Solver, step_precisions, window_steps
from .sample import DiffusionSample, Seeds
from .schedule import Schedule, make_schedule
from .solvers import draw_noise, log_density, make_steps
from .transformer import Transformer


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
        steps, window = call.params.steps, call.window
        self.points = range(steps, steps + 1)
        if "latents" in call.params.want:
            self.points = range(steps + 1)
        elif "latents:window" in call.params.want and window:
            self.points = range(window.start, window.stop + 1)
        self.with_means = "means" in call.params.want
        self.latents: list[Tensor] = []
        self.means: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.stds: list[float] = []

    def keep(self, point: int, latents: Tensor) -> None:
        if point in self.points:
            self.latents.append(latents)

    def drawn(self, mean: Tensor, std: float, logprob: Tensor) -> None:
        self.logprobs.append(logprob)
        self.stds.append(std)
        if self.with_means:
            self.means.append(mean)


class DiffusionRollouts:
    """The transformers of a policy, and the loop over their steps.

    A trajectory is computed from one version of the weights: swaps wait for the batch under way. Samples of equal
    shapes are computed `max_batch` at a time; none depends on which others are in its batch.
    """

    def __init__(
        self,
        transformers: Mapping[str, Transformer],
        family: Family,
        scheduler: Any,
        policy: Policy,
        gate: StepGate,
        *,
        max_batch: int,
        boundary: float | None,
    ) -> None:
        self.transformers, self.family, self.scheduler, self.policy = dict(transformers), family, scheduler, policy
        self.max_batch, self.boundary = max_batch, boundary
        self.first = next(iter(self.transformers.values()))
        self.gate = gate
        self._may_run = threading.Event()
        self._may_run.set()
        self._closed = False

    # calls

    def plan(self, params: DiffusionParams, guidance: float | None, cfg: tuple[float, float] | None) -> Call:
        """Work out everything that the samples of a call share; errors come before anything is computed."""
        size = self.family.size(params)
        mu = self.family.mu(self.scheduler, size, params.steps)
        schedule = make_schedule(self.scheduler, params, mu, linear=self.family.LINEAR_SIGMAS)
        window = window_steps(params.solver, params.steps, params.training_step)
        named = step_precisions(params.precision, params.steps, window)
        precisions = [self._check_precision(name) for name in named]
        return Call(params, size, guidance, cfg, schedule, window, precisions)

    def _check_precision(self, name: str) -> str:
        quant = self.first.resolver.plan.quant
        if name in ("quantized", quant):
            return "quantized"
        possible = ["quantized", *([quant] if quant != "bf16" else [])]
        if quant != "bf16":
            possible += ["weight_only", *(["bf16"] if self.first.dual else [])]
        if name in possible:
            return name
        more = "" if self.first.dual else "; for 'bf16' open the engine with EngineConfig(dual='bf16')"
        raise ConfigError(f"precision {name!r} is not to be had here; possible: {', '.join(possible)}{more}")

    @torch.no_grad()
    def run(self, call: Call, wanted: Sequence[Wanted]) -> list[DiffusionSample]:
        """All samples, in the order asked for."""
        done: dict[int, DiffusionSample] = {}
        for places in self._batches(wanted):
            batch = [wanted[place] for place in places]
            done |= zip(places, self._run_batch(call, batch), strict=True)
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

    def _run_batch(self, call: Call, batch: Sequence[Wanted]) -> list[DiffusionSample]:
        while True:
            self._may_run.wait()
            if self._closed:
                raise ClosedError("the engine has been closed")
            with self.gate.step(lambda: not self._may_run.is_set()) as entered:
                if entered:
                    self.policy.check_servable()
                    version = self.policy.version
                    assert version is not None
                    return list(self._samples(call, batch, self._denoise(call, batch), version))

    def _denoise(self, call: Call, batch: Sequence[Wanted]) -> Trajectory:
        params, held = call.params, getattr(torch, call.params.latents_dtype)
        device, shape = self.first.capability.device, self.family.noise_shape(call.size)
        latents = self.family.pack(draw_noise([one.seeds.init for one in batch], shape).to(device)).to(held)
        trajectory = Trajectory(call)
        trajectory.keep(0, latents)
        for i, step in enumerate(make_steps(params.solver, call.schedule.sigmas.tolist(), call.window)):
            velocity = self._velocity(call, i, latents, [one.embeds for one in batch]).float()
            mean = latents.float() * step.x + velocity * step.v
            if i in call.window:
                noise = self.family.pack(draw_noise([one.seeds.step for one in batch], shape, i).to(device))
                latents = (mean + noise * step.std).to(held)
                density = _density(params.solver, latents.float(), mean, step.std)
                trajectory.drawn(mean, step.std, density)
            else:
                latents = mean.to(held)
            trajectory.keep(i + 1, latents)
        return trajectory

    def _velocity(self, call: Call, step: int, latents: Tensor, embeds: Sequence[Embeds]) -> Tensor:
        timestep = call.schedule.timesteps[step].to(latents.device).expand(len(latents))
        second = self.boundary is not None and float(timestep[0]) < self.boundary
        transformer = list(self.transformers.values())[int(second)]
        with self.first.switch.at(call.precisions[step]):
            velocity = self._forward(transformer, call, latents, timestep, embeds)
            if call.cfg is None:
                return velocity
            negative = [one.negative for one in embeds if one.negative is not None]
            without = self._forward(transformer, call, latents, timestep, negative)
        return self.family.guide(velocity, without, call.cfg[int(second)])

    def _forward(
        self, transformer: Transformer, call: Call, latents: Tensor, timestep: Tensor, embeds: Sequence[Embeds]
    ) -> Tensor:
        inputs = self.family.inputs(latents.to(transformer.dtype), timestep, embeds, call.size, call.guidance)
        return transformer.module(**inputs, return_dict=False)[0]

    def _samples(
        self, call: Call, batch: Sequence[Wanted], trajectory: Trajectory, version: str
    ) -> Iterator[DiffusionSample]:
        latents = torch.stack(trajectory.latents, 1)
        logprobs = torch.stack(trajectory.logprobs, 1).cpu() if trajectory.logprobs else None
        means = torch.stack(trajectory.means, 1) if trajectory.means else None
        for i, one in enumerate(batch):
            yield DiffusionSample(
                prompt_index=one.prompt_index,
                latents=latents[i],
                points=trajectory.points,
                window=call.window,
                logprobs=logprobs[i] if logprobs is not None and "logprobs" in call.params.want else None,
                stds=torch.tensor(trajectory.stds, dtype=torch.float32),
                means=None if means is None else means[i],
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

    # pausing

    def pause(self) -> None:
        """Returns once no batch is under way; the next ones wait for `resume`."""
        self._may_run.clear()
        with self.gate.visit():
            pass

    def resume(self) -> None:
        self._may_run.set()

    def close(self) -> None:
        self._closed = True
        self._may_run.set()


def _shapes(embeds: Embeds) -> tuple[Any, ...]:
    parts = [tuple(part.shape) for part in (embeds.prompt, embeds.pooled, embeds.mask) if part is not None]
    return (*parts, *(() if embeds.negative is None else ("negative", *_shapes(embeds.negative))))


def _density(solver: Solver, latents: Tensor, mean: Tensor, std: float) -> Tensor:
    assert not isinstance(solver, ODE)
    return log_density(latents, mean, std, solver.log_density)
