"""Sigmas and timesteps of a rollout, from a diffusers scheduler."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from ...quant import ModelError
from .params import DiffusionParams


class Schedule(Struct, frozen=True):
    """`sigmas`: float32 [steps + 1], the last one 0; `timesteps`: float32 [steps], 1000 * sigma or what was asked."""

    sigmas: Tensor
    timesteps: Tensor


def make_schedule(scheduler: Any, params: DiffusionParams, mu: float | None, *, linear: bool) -> Schedule:
    """The grid of `scheduler` for these steps: with its shift (`mu` where that depends on the image's size).

    `linear`: the model's pipeline hands sigmas 1 ... 1 / steps to the scheduler; else the scheduler lays its own. Only
    the grid is the scheduler's: the steps on it are the solver's. `ModelError` if it lays none for flow matching.
    """
    scheduler = scheduler.from_config(scheduler.config)  # set_timesteps changes it, and other threads may ask
    name, options = type(scheduler).__name__, _options(scheduler, params, mu, linear=linear)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if not options.keys() <= accepted.keys():
        raise ModelError(f"{name} takes no {', '.join(options)}; it takes {', '.join(accepted)}")
    try:
        scheduler.set_timesteps(**({} if "sigmas" in options else {"num_inference_steps": params.steps}), **options)
    except ValueError as error:
        raise ModelError(f"{name} lays no grid of {params.steps} steps: {error}") from error
    if not hasattr(scheduler, "sigmas"):
        raise ModelError(f"{name} has no sigmas: it is no scheduler for flow matching")
    sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float32).cpu()
    timesteps = torch.as_tensor(scheduler.timesteps, dtype=torch.float32).cpu()
    _check_flow(name, sigmas, timesteps, params.steps)
    if params.timesteps == "truncated":
        timesteps = (sigmas[:-1] * 1000).trunc()  # in float32, as DanceGRPO does: 0.7 gives 700
    return Schedule(sigmas, timesteps)


def _options(scheduler: Any, params: DiffusionParams, mu: float | None, *, linear: bool) -> dict[str, Any]:
    """What `set_timesteps` gets, as diffusers' pipelines give it."""
    options: dict[str, Any] = {}
    accepts_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if params.sigmas is not None:
        options["sigmas"] = list(params.sigmas)
    elif linear and accepts_sigmas and not scheduler.config.get("use_flow_sigmas", False):
        options["sigmas"] = np.linspace(1.0, 1 / params.steps, params.steps)
    if mu is not None and scheduler.config.get("use_dynamic_shifting", False):
        options["mu"] = mu
    return options


def _check_flow(name: str, sigmas: Tensor, timesteps: Tensor, steps: int) -> None:
    """Flow matching: sigmas fall from at most 1 to 0, one a step, and timesteps are 1000 times these."""
    if len(sigmas) != steps + 1 or float(sigmas[-1]) != 0 or not bool((sigmas.diff() < 0).all()):
        raise ModelError(f"{name} lays no falling grid of {steps} steps to 0: {sigmas.tolist()}")
    off = (timesteps - 1000 * sigmas[:-1]).abs().max()
    if float(sigmas[0]) > 1 or float(off) > 1:  # some schedulers round timesteps to integers
        raise ModelError(
            f"{name} lays no grid for flow matching (its config may want use_flow_sigmas): {sigmas.tolist()}"
        )


def resolution_shift(scheduler: Any, image_tokens: int) -> float:
    """FLUX.1's and Qwen-Image's mu: linear in the number of image tokens, as the scheduler's config says."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - least) / (high - low)
    return image_tokens * slope + (least - slope * low)
