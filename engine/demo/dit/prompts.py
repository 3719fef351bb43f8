"""What stands for a prompt: fixed random embeds, a set a digit, and one for "any digit"."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dit.families import Embeds
from .digits import NUM_CLASSES

ANY = NUM_CLASSES  # the class that training drops labels to
NUM_TOKENS, TEXT_FEATURES, POOLED_FEATURES = 2, 32, 32


def make_tables() -> tuple[Tensor, Tensor]:
    """(prompts [11, tokens, features], pooled [11, features]) in BF16: inputs, not weights, the same always."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(NUM_CLASSES + 1, NUM_TOKENS, TEXT_FEATURES, generator=generator)
    pooled = torch.randn(NUM_CLASSES + 1, POOLED_FEATURES, generator=generator)
    return prompts.bfloat16(), pooled.bfloat16()


def embeds_of(digit: int) -> Embeds:
    """One digit's prompt, as an engine takes it."""
    prompts, pooled = make_tables()
    return Embeds(prompts[digit], pooled[digit])
