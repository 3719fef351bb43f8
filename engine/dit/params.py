"""What a user asks a diffusion rollout for: `DiffusionParams`, solvers, windows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Literal

from ...quant import ConfigError
from ..config import Settings

# "quantized": as the engine's quant says (its name works, too); "weight_only": the same weights, activations in BF16;
# "bf16": the BF16 copy of EngineConfig(dual="bf16"), or all there is in an engine that is not quantized
Precision = str
Precisions = Precision | Mapping[str, Precision | tuple[Precision, int]]
Sharing = Literal["per_sample", "shared"]
Want = Literal["latents", "latents:window", "latents:final", "logprobs", "means", "image", "sigmas", "embeds"]
LogDensity = Literal["gaussian", "squared_error"]


class ProgressiveWindow(Settings, frozen=True, tag=True):
    """`size` steps that begin at step `start` and move on by `stride` after every `every` training steps (MixGRPO,
    arXiv:2507.21802); at the end of the schedule they begin again."""

    size: int = 4
    every: int = 25
    start: int = 0
    stride: int = 1

    def bounds(self) -> dict[str, bool]:
        return {
            "size >= 1": self.size >= 1,
            "every >= 1": self.every >= 1,
            "start >= 0": self.start >= 0,
            "stride >= 1": self.stride >= 1,
        }


class RandomWindow(Settings, frozen=True, tag=True):
    """`size` steps within `range`, a half-open interval of steps (None: all), drawn anew for every training step."""

    size: int = 2
    range: tuple[int, int] | None = None
    seed: int = 0

    def bounds(self) -> dict[str, bool]:
        low, high = self.range or (0, self.size)
        return {"size >= 1": self.size >= 1, "0 <= range, as long as size": low >= 0 and high - low >= self.size}


Window = tuple[int, int] | ProgressiveWindow | RandomWindow


class ODE(Settings, frozen=True, tag=True):
    """Euler steps along the flow: no noise, no log-probs (diffusers' FlowMatchEulerDiscreteScheduler)."""


class FlowSDE(Settings, frozen=True, tag=True):
    """Flow-GRPO's SDE (arXiv:2505.05470): std = noise_level * sqrt(sigma / (1 - sigma)) * sqrt(-dt).

    `window`: the steps that are drawn (None: all); the others follow the ODE. `log_density`: "gaussian" is the mean
    over a latent's elements of the Gaussian log-density; "squared_error" is -mean((x - mean)**2).
    """

    noise_level: float = 0.7
    window: Window | None = None
    log_density: LogDensity = "gaussian"

    def bounds(self) -> dict[str, bool]:
        return {"noise_level > 0, finite": 0 < self.noise_level < inf}


class FlowCPS(Settings, frozen=True, tag=True):
    """Coefficients-preserving sampling (arXiv:2509.05952): std = sigma_next * sin(noise_level * pi / 2).

    Its last step, to sigma 0, has no noise: it follows the ODE and is not in the window.
    """

    noise_level: float = 0.7
    window: Window | None = None
    log_density: LogDensity = "squared_error"

    def bounds(self) -> dict[str, bool]:
        return {"0 < noise_level <= 1": 0 < self.noise_level <= 1}


class DanceSDE(Settings, frozen=True, tag=True):
    """DanceGRPO's SDE (arXiv:2505.07818): std = eta * sqrt(-dt), drift corrected by the score."""

    eta: float = 0.3
    window: Window | None = None
    log_density: LogDensity = "gaussian"

    def bounds(self) -> dict[str, bool]:
        return {"eta > 0, finite": 0 < self.eta < inf}


Solver = ODE | FlowSDE | FlowCPS | DanceSDE


class DiffusionParams(Settings, frozen=True):
    """How samples are drawn.

    `height`, `width` in pixels (None: the model's default), `num_frames` of a video. `guidance_scale` feeds models
    that were distilled with one (FLUX dev; None: the model's default); `true_cfg_scale` above 1 runs the model twice,
    with and without the prompt (`negative_prompt`, or negative embeds), `true_cfg_scale_2` is that of a second
    transformer (None: the same). `sigmas` [steps] in place of the scheduler's own, before its shift. `n` samples of
    every prompt: a group.
    Sample i of prompt p draws its first latent with `init_seed + p * n + i` ("shared": all of a group with
    `init_seed + p`) and the noise of its steps with `step_seed + ...` likewise, below 2**32 (torch's CPU generator
    knows no more bits); None: seeds from 2**31 on that no other call of the engine has.
    `precision`: one for all steps, or by part: {"window": "bf16", "first": ("bf16", 2), "rest": "quantized"}; the keys
    "window", "first", "last" (with their number of steps), "rest"; earlier keys of this list win.
    `want`: "latents" (all steps + 1), "latents:window" (those around drawn steps), "latents:final" (which come, too,
    where no others do); "logprobs", "means" of the drawn steps, "image"; "sigmas" and "embeds" come always.
    `latents_dtype`: what latents are held in,
    and log-probs are computed from. `timesteps`: "truncated" hands int(1000 * sigma) to the model, as DanceGRPO does.
    `training_step`: where moving windows stand.
    """

    steps: int = 28
    height: int | None = None
    width: int | None = None
    num_frames: int = 1
    n: int = 1
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    true_cfg_scale_2: float | None = None
    negative_prompt: str | None = None
    sigmas: Sequence[float] | None = None
    solver: Solver = ODE()
    training_step: int = 0
    init_seed: int | None = None
    step_seed: int | None = None
    init_noise: Sharing = "per_sample"
    step_noise: Sharing = "per_sample"
    precision: Precisions | None = None
    want: Sequence[Want] = ("latents:final", "logprobs")
    latents_dtype: Literal["float32", "bfloat16"] = "float32"
    timesteps: Literal["exact", "truncated"] = "exact"

    def bounds(self) -> dict[str, bool]:
        return {
            "steps >= 1": self.steps >= 1,
            "n >= 1": self.n >= 1,
            "height >= 1": self.height is None or self.height >= 1,
            "width >= 1": self.width is None or self.width >= 1,
            "num_frames >= 1": self.num_frames >= 1,
            "sigmas falling, in (0, 1], one a step": self.sigmas is None or self._sigmas_hold(self.sigmas),
            "0 <= init_seed < 2**32": self.init_seed is None or 0 <= self.init_seed < 2**32,
            "0 <= step_seed < 2**32": self.step_seed is None or 0 <= self.step_seed < 2**32,
            "training_step >= 0": self.training_step >= 0,
            "guidance_scale finite": self.guidance_scale is None or isfinite(self.guidance_scale),
            "true_cfg_scale >= 1, finite": self.true_cfg_scale is None or 1 <= self.true_cfg_scale < inf,
            "true_cfg_scale_2 >= 1, finite, with true_cfg_scale above 1": self.true_cfg_scale_2 is None
            or (1 <= self.true_cfg_scale_2 < inf and self.wants_cfg),
            "negative_prompt with true_cfg_scale above 1": self.negative_prompt is None or self.wants_cfg,
        }

    @property
    def wants_cfg(self) -> bool:
        """Whether the model runs twice a step."""
        return self.true_cfg_scale is not None and self.true_cfg_scale > 1

    def _sigmas_hold(self, sigmas: Sequence[float]) -> bool:
        falls = all(left > right for left, right in zip(sigmas, sigmas[1:], strict=False))
        return len(sigmas) == self.steps and falls and sigmas[-1] > 0 and sigmas[0] <= 1


def window_steps(solver: Solver, steps: int, training_step: int) -> range:
    """The steps that `solver` draws, of `steps` in all; none for the ODE."""
    if isinstance(solver, ODE):
        return range(0)
    last = steps - 1 if isinstance(solver, FlowCPS) else steps  # the last step of CPS has no noise
    if last == 0:
        raise ConfigError("CPS draws no noise at its last step: with 1 step there is none to draw")
    match solver.window:
        case None:
            return range(last)
        case ProgressiveWindow() as window:
            return _progressive(window, last, training_step)
        case RandomWindow() as window:
            return _random(window, last, training_step)
        case (start, stop):
            _check_inside(start, stop, steps)
    if start == last:
        raise ConfigError(f"window [{start}, {stop}) of CPS holds the last step only, which has no noise")
    return range(start, min(stop, last))


def _progressive(window: ProgressiveWindow, last: int, training_step: int) -> range:
    _check_inside(window.start, window.start + window.size, last)
    places = last - window.size - window.start + 1
    first = window.start + training_step // window.every * window.stride % places
    return range(first, first + window.size)


def _random(window: RandomWindow, last: int, training_step: int) -> range:
    low, high = window.range or (0, last)
    _check_inside(low, max(high, low + window.size), last)
    first = random.Random(window.seed * 1_000_003 + training_step).randint(low, high - window.size)
    return range(first, first + window.size)


def _check_inside(start: int, stop: int, steps: int) -> None:
    if not 0 <= start < stop <= steps:
        raise ConfigError(f"window [{start}, {stop}) lies outside of the {steps} steps that can be drawn")


PRECISION_PARTS = ("window", "first", "last", "rest")


def step_precisions(precision: Precisions | None, steps: int, drawn: range) -> list[Precision]:
    """The precision of every step; "quantized" where nothing is said."""
    if precision is None or isinstance(precision, str):
        return [precision or "quantized"] * steps
    unknown = sorted(precision.keys() - set(PRECISION_PARTS))
    if unknown:
        raise ConfigError(f"precision has no part {', '.join(unknown)}; possible: {', '.join(PRECISION_PARTS)}")
    return [_precision_of(precision, step, steps, drawn) for step in range(steps)]


def _precision_of(
    parts: Mapping[str, Precision | tuple[Precision, int]], step: int, steps: int, drawn: range
) -> Precision:
    for part in PRECISION_PARTS:
        if part not in parts:
            continue
        name, count = _named(part, parts[part])
        inside = {"window": step in drawn, "first": step < count, "last": step >= steps - count, "rest": True}
        if inside[part]:
            return name
    return "quantized"


def _named(part: str, value: Precision | tuple[Precision, int]) -> tuple[Precision, int]:
    counted = part in ("first", "last")
    match value:
        case str() as name if not counted:
            return name, 0
        case (str() as name, int() as count) if counted and count >= 1:
            return name, count
    wanted = "(precision, number of steps)" if counted else "the name of a precision"
    raise ConfigError(f"precision[{part!r}] is {wanted}, got {value!r}")
