"""Sizes of the demo of diffusion transformers."""

from typing import Literal

import msgspec

from ...dit.params import DiffusionParams, FlowSDE
from ...errors import ConfigError
from .digits import NUM_CLASSES, SIDE
from .model import Recipe
from .trainer import FlowGrpoConfig

Quant = Literal["nvfp4", "fp8"]
VAE_SCALE = 8  # what an engine assumes where there is no VAE: 8 pixels a latent's pixel


class DitDemoConfig(msgspec.Struct, frozen=True):
    """96 images a step, 8 digits by 12: Flow-GRPO's groups at a size that one core draws and learns in seconds."""

    quant: Quant = "nvfp4"
    steps: int = 16
    seed: int = 0
    prompts: int = 8  # of the ten digits, drawn anew every step
    samples: int = 12  # of each prompt: GRPO's group
    denoising_steps: int = 8
    noise_level: float = 0.7
    compared: int = 12  # samples a digit that are drawn in every precision after training
    threads: int = 1  # of torch; two that wait for each other on a busy machine are slower than one
    recipe: Recipe = Recipe()
    trainer: FlowGrpoConfig = FlowGrpoConfig()

    def __post_init__(self) -> None:
        if self.steps < 1 or not 1 <= self.prompts <= NUM_CLASSES or self.samples < 2 or self.compared < 1:
            raise ConfigError(
                f"the demo wants steps >= 1, prompts 1 to {NUM_CLASSES}, samples >= 2 (a group), compared >= 1; "
                f"got {self}"
            )
        if self.denoising_steps < 2:
            raise ConfigError(f"the demo wants denoising_steps >= 2, got {self.denoising_steps}")

    def params(self, samples: int, **changes: object) -> DiffusionParams:
        """What every rollout asks for: the whole trajectory, its log-probs and means."""
        asked: dict[str, object] = {
            "steps": self.denoising_steps,
            "height": SIDE * VAE_SCALE,
            "width": SIDE * VAE_SCALE,
            "n": samples,
            "solver": FlowSDE(noise_level=self.noise_level),
            "want": ("latents", "logprobs", "means"),
        }
        return DiffusionParams(**{**asked, **changes})
