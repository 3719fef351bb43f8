"""One denoising step of every solver. All are linear in latent and velocity: mean = x * latent + v * velocity.

Flow matching: latent = (1 - sigma) * clean + sigma * noise, velocity v = noise - clean, sigma falls from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from msgspec import Struct
from torch import Tensor

from .params import ODE, DanceSDE, FlowCPS, FlowSDE, LogDensity, Solver

BLOCK = 1024  # values that are added up together; few enough for torch to use one thread
ALMOST_ONE = 1e-5  # float32 shifts miss 1 by an ulp, and UniPC's grid begins 1e-6 below: std would be in the hundreds


class Step(Struct, frozen=True):
    """next = x * latent + v * velocity + std * noise."""

    x: float
    v: float
    std: float = 0.0

    def mean(self, latents: Tensor, velocity: Tensor) -> Tensor:
        """Both float32 [*shape]."""
        return latents * self.x + velocity * self.v


def make_steps(solver: Solver, sigmas: Sequence[float], drawn: range) -> list[Step]:
    """A step for every interval of `sigmas` [steps + 1]; those in `drawn` have noise, the others follow the ODE."""
    pairs = list(zip(sigmas, sigmas[1:], strict=False))
    largest = sigmas[1]  # stands for sigma 1, where Flow-GRPO's std is infinite
    return [
        _noisy(solver, now, then, largest) if i in drawn else _euler(now, then) for i, (now, then) in enumerate(pairs)
    ]


def _euler(sigma: float, following: float) -> Step:
    return Step(1.0, following - sigma)


def _noisy(solver: Solver, sigma: float, following: float, largest: float) -> Step:
    match solver:
        case FlowSDE():
            return _flow_sde(sigma, following, largest, solver.noise_level)
        case FlowCPS():
            return _flow_cps(sigma, following, solver.noise_level)
        case DanceSDE():
            return _dance_sde(sigma, following, solver.eta)
        case ODE():
            return _euler(sigma, following)


def _flow_sde(sigma: float, following: float, largest: float, level: float) -> Step:
    """s = level * sqrt(sigma / (1 - sigma)); mean = x (1 + s^2 dt / 2 sigma) + v (1 + s^2 (1 - sigma) / 2 sigma) dt."""
    dt = following - sigma
    variance = level**2 * sigma / (1 - (largest if 1 - sigma < ALMOST_ONE else sigma))
    half = variance / (2 * sigma)
    return Step(1 + half * dt, (1 + half * (1 - sigma)) * dt, math.sqrt(-variance * dt))


def _flow_cps(sigma: float, following: float, level: float) -> Step:
    """mean = clean (1 - next) + noise sqrt(next^2 - std^2), clean = x - sigma v, noise = x + (1 - sigma) v."""
    std = following * math.sin(level * math.pi / 2)
    kept = math.sqrt(following**2 - std**2)
    return Step(1 - following + kept, kept * (1 - sigma) - (1 - following) * sigma, std)


def _dance_sde(sigma: float, following: float, eta: float) -> Step:
    """mean = x + dt (v - eta^2 score / 2), score = -(x - (1 - sigma) clean) / sigma^2, clean = x - sigma v."""
    dt = following - sigma
    push = eta**2 / 2 / sigma  # x - (1 - sigma) clean = sigma (x + (1 - sigma) v)
    return Step(1 + push * dt, (1 + push * (1 - sigma)) * dt, eta * math.sqrt(-dt))


def log_density(latents: Tensor, mean: Tensor, std: float, kind: LogDensity) -> Tensor:
    """float32 [batch]: the mean over all elements of a sample, latents and mean float32 [batch, ...]."""
    squares = torch.stack([_mean(sample) for sample in (latents - mean).square().flatten(1)])
    if kind == "squared_error":
        return -squares
    return -squares / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


def _mean(values: Tensor) -> Tensor:
    """[num_values] -> [], in an order that knows neither the batch nor the number of threads."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    while len(padded) > 1:
        padded = torch.nn.functional.pad(padded, (0, 0, 0, len(padded) % 2))
        padded = padded[0::2] + padded[1::2]
    return padded[0].sum() / len(values)


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """float32 [len(seeds), *shape] of standard normal noise on the host: the first latents, a generator a sample.

    As a diffusers pipeline draws them with a CPU generator of this seed in float32; torch's CPU generator draws the
    same on every machine, whatever the engine's device. It knows the low 32 bits of a seed only.
    """
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class StepNoise:
    """Noise of the steps, a generator a sample: that of step i is the i-th it draws, wherever the window lies."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(_scramble(seed)) for seed in seeds]
        self._shape, self._next = tuple(shape), 0

    def draw(self, step: int) -> Tensor:
        """float32 [len(seeds), *shape] on the host; steps come in rising order."""
        assert step >= self._next
        while True:
            noise = torch.stack([torch.randn(*self._shape, generator=generator) for generator in self._generators])
            self._next += 1
            if self._next > step:
                return noise


def _scramble(seed: int) -> int:
    """A bijection of 32 bits (MurmurHash3's finalizer): no step draws what a first latent of the same seed draws."""
    mixed = seed ^ 0x9E3779B9
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return mixed ^ (mixed >> 16)
