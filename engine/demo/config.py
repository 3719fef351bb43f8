"""Sizes of the demo."""

from typing import Literal

import msgspec

from ..errors import ConfigError
from .trainer import TrainerConfig

Quant = Literal["nvfp4", "fp8"]


class DemoConfig(msgspec.Struct, frozen=True):
    """64 completions a step: what two CPU cores can do and still show the reward rise within 8 steps."""

    quant: Quant = "nvfp4"
    steps: int = 8
    seed: int = 0
    prompts: int = 8  # fresh ones every step
    samples: int = 8  # of each prompt: GRPO's group
    max_new_tokens: int = 24
    kl_sequences: int = 4
    calibration_sequences: int = 16  # of the first rollouts, for the static scales
    compare_static: bool = True  # a second engine with static activation scales, swapped alike
    trainer: TrainerConfig = TrainerConfig()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.prompts < 1 or self.samples < 2:
            raise ConfigError(f"the demo wants steps >= 1, prompts >= 1 and samples >= 2 (a group); got {self}")
