"""Meters look at the activations that enter a weight: one counts what its static scale clips, one takes the amax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

# A scale is amax / code_max, rounded; times code_max, rounded again, it may miss the amax it came from by an ulp.
ROUNDING = 1 + 2.0**-20


class ActivationMeter(Protocol):
    """Is shown every input [num_tokens, in_features] of one weight (of all experts of a layer, in parts)."""

    def __call__(self, x: Tensor) -> None: ...


class AmaxMeter:
    """The largest |x| so far: what calibration records. float32 scalar; zero before the first input."""

    def __init__(self, device: torch.device) -> None:
        self.amax = torch.zeros((), device=device)

    def __call__(self, x: Tensor) -> None:
        if x.numel():
            torch.maximum(self.amax, x.abs().amax().float(), out=self.amax)


class ClippingMeter:
    """Counts the activations beyond `input_scale * code_max`, the largest value that a static scale can hold.

    `input_scale` is the slot's own storage, read at every call: a swap may bring new scales. Where shards or experts
    of a foreign checkpoint have unequal scales, the smallest one counts. Counts stay on the device.
    """

    def __init__(self, input_scale: Tensor, code_max: float) -> None:
        self.input_scale, self.code_max = input_scale, code_max
        self.counts = torch.zeros(2, dtype=torch.int64, device=input_scale.device)  # beyond, seen

    def __call__(self, x: Tensor) -> None:
        limit = self.input_scale.amin().view(1) * (self.code_max * ROUNDING)
        self.counts[0] += (x.abs() > limit).sum()
        self.counts[1] += x.numel()

    def reset(self) -> None:
        self.counts.zero_()


class Metered(Protocol):
    """A weight with a name and, perhaps, a meter."""

    @property
    def name(self) -> str: ...
    @property
    def meter(self) -> ActivationMeter | None: ...


def clipping_shares(weights: Iterable[Metered]) -> dict[str, float]:
    """Name -> share of activations beyond the static scale since the last reset (0 if none came); one transfer."""
    meters = {w.name: w.meter for w in weights if isinstance(w.meter, ClippingMeter)}
    if not meters:
        return {}
    counts = torch.stack([meter.counts for meter in meters.values()]).tolist()
    return {name: beyond / max(1, seen) for name, (beyond, seen) in zip(meters, counts, strict=True)}


def reset_clipping(weights: Iterable[Metered]) -> None:
    """Start to count anew."""
    for weight in weights:
        if isinstance(weight.meter, ClippingMeter):
            weight.meter.reset()
