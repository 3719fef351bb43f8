"""Sigmas and timesteps of a rollout, from a diffusers scheduler."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from msgspec import Struct

from ...quant import ModelError
from .params import DiffusionParams


class Schedule(Struct, frozen=True):
    """`sigmas`: float32 [steps + 1], the last one 0; `timesteps`: float32 [steps], 1000 * sigma or what was asked."""

    sigmas: torch.Tensor
    timesteps: torch.Tensor


def make_schedule(scheduler: Any, params: DiffusionParams, mu: float | None, *, linear: bool) -> Schedule:
    """The grid of `scheduler` for these steps: with its shift (`mu` where that depends on the image's size).

    `linear`: the model's pipeline hands sigmas 1 ... 1 / steps to the scheduler; else the scheduler lays its own.
    """
    scheduler = scheduler.from_config(scheduler.config)  # set_timesteps changes it, and other threads may ask
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    options: dict[str, Any] = {}
    if params.sigmas is not None:
        options["sigmas"] = list(params.sigmas)
    elif linear and "sigmas" in accepted and not scheduler.config.get("use_flow_sigmas", False):
        options["sigmas"] = np.linspace(1.0, 1 / params.steps, params.steps)
    if mu is not None and scheduler.config.get("use_dynamic_shifting", False):
        options["mu"] = mu
    if not options.keys() <= accepted.keys():
        raise ModelError(f"{type(scheduler).__name__} takes no {', '.join(options)}; it takes {', '.join(accepted)}")
    scheduler.set_timesteps(**({} if "sigmas" in options else {"num_inference_steps": params.steps}), **options)
    sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float32).cpu()
    if len(sigmas) != params.steps + 1 or float(sigmas[-1]) != 0 or not bool((sigmas.diff() < 0).all()):
        raise ModelError(f"{type(scheduler).__name__} lays no falling grid of {params.steps} steps to 0: {sigmas}")
    timesteps = torch.as_tensor(scheduler.timesteps, dtype=torch.float32).cpu()
    if params.timesteps == "truncated":
        timesteps = (sigmas[:-1].double() * 1000).trunc().float()
    return Schedule(sigmas, timesteps)


def resolution_shift(scheduler: Any, image_tokens: int) -> float:
    """FLUX.1's and Qwen-Image's mu: linear in the number of image tokens, as the scheduler's config says."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - least) / (high - low)
    return image_tokens * slope + (least - slope * low)
