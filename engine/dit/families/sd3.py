"""Stable Diffusion 3 and 3.5: true classifier-free guidance, latents as images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..params import DiffusionParams
from ..schedule import resolution_shift
from .family import (
    Embeds,
    Size,
    check_text_to_image,
    distilled_guidance,
    image_size,
    plain_cfg,
    stack_pooled,
    stack_prompts,
    to_uint8,
)


class SD3:
    """Latents [channels, height, width]."""

    TRANSFORMER: ClassVar[str] = "SD3Transformer2DModel"
    scheduler: Mapping[str, Any] = {"shift": 3.0}
    KEEP: ClassVar[tuple[str, ...]] = ("context_embedder", "norm_out*", "pos_embed*", "time_text_embed*")
    LINEAR_SIGMAS: ClassVar[bool] = False
    MASKED: ClassVar[bool] = False
    PIXELS: ClassVar[int] = 1024

    def __init__(self, config: Mapping[str, Any], vae_scale: int) -> None:
        check_text_to_image(config)
        self.channels, self.patch, self.vae_scale = config["in_channels"], config["patch_size"], vae_scale
        self.text_width, self.pooled_width = config["joint_attention_dim"], config["pooled_projection_dim"]

    def size(self, params: DiffusionParams) -> Size:
        return image_size(params, self.PIXELS, self.patch * self.vae_scale)

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        return self.channels, size.height // self.vae_scale, size.width // self.vae_scale

    def num_tokens(self, size: Size) -> int:
        return math.prod(length // self.patch for length in self.noise_shape(size)[1:])

    def pack(self, noise: Tensor) -> Tensor:
        return noise

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def mu(self, scheduler: Any, size: Size, steps: int) -> float | None:
        return resolution_shift(scheduler, self.num_tokens(size))

    def guidance(self, params: DiffusionParams) -> float | None:
        return distilled_guidance(params, None)

    def inputs(
        self, latents: Tensor, timestep: Tensor, embeds: Sequence[Embeds], size: Size, guidance: float | None
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": timestep,
            "encoder_hidden_states": stack_prompts(embeds),
            "pooled_projections": stack_pooled(embeds),
        }

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        return plain_cfg(with_prompt, without, scale)

    def encode(self, pipeline: Any, prompt: str) -> Embeds:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=[prompt], prompt_2=[prompt], prompt_3=[prompt], do_classifier_free_guidance=False
        )
        return Embeds(embeds[0], pooled[0])

    def decode(self, pipeline: Any, latents: Tensor, size: Size) -> Tensor:
        vae = pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        return to_uint8(vae.decode(scaled.to(vae.dtype), return_dict=False)[0])
