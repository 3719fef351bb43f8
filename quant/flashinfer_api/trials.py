"""Random stored weights for the self-check."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Scheme, WeightShape

SEED = 0x5EED
WEIGHT_STD = 0.03


def random_stored(scheme: Scheme, shape: WeightShape, device: torch.device, input_amax: float) -> dict[str, Tensor]:
    """Gaussian weights as the scheme stores them; a static `input_scale` reaches `input_amax`."""
    generator = torch.Generator(device).manual_seed(SEED)
    weight = torch.empty(shape.matrix, dtype=torch.bfloat16, device=device).normal_(0, WEIGHT_STD, generator=generator)
    stored = scheme.quantize(weight, shape)
    if scheme.activation == "static":
        spec = scheme.scales(shape)["input_scale"]
        stored["input_scale"] = torch.full(spec.shape, input_amax / scheme.code_max, dtype=spec.dtype, device=device)
    return stored


def random_input(tokens: int, cols: int, device: torch.device) -> Tensor:
    """BF16 [tokens, cols], Gaussian, tokens of different sizes."""
    generator = torch.Generator(device).manual_seed(SEED + tokens)
    x = torch.empty(tokens, cols, device=device).normal_(generator=generator)
    size = torch.empty(tokens, 1, device=device).uniform_(0.5, 2.0, generator=generator)
    return (x * size).bfloat16()
