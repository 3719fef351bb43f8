"""FLUX.1 (dev: distilled guidance; schnell: none)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
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
from .tokens import grid_ids, patches_to_tokens, tokens_to_patches


class Flux:
    """Tokens of 2 x 2 latent pixels; ids [tokens, 3] give every token's row and column."""

    TRANSFORMER: ClassVar[str] = "FluxTransformer2DModel"
    KEEP: ClassVar[tuple[str, ...]] = ("proj_out", "time_text_embed*", "context_embedder*", "x_embedder*", "norm_out*")
    LINEAR_SIGMAS: ClassVar[bool] = True
    MASKED: ClassVar[bool] = False
    GUIDANCE: ClassVar[float] = 3.5
    PIXELS: ClassVar[int] = 1024

    def __init__(self, config: Mapping[str, Any], vae_scale: int) -> None:
        check_text_to_image(config)
        self.channels, self.vae_scale = config["in_channels"] // 4, vae_scale
        self.text_width, self.pooled_width = config["joint_attention_dim"], config["pooled_projection_dim"]
        self.distilled = bool(config.get("guidance_embeds", False))
        dev = {"shift": 3.0, "use_dynamic_shifting": True}
        self.scheduler: Mapping[str, Any] = dev if self.distilled else {"shift": 1.0}

    def size(self, params: DiffusionParams) -> Size:
        return image_size(params, self.PIXELS, 2 * self.vae_scale)

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        return self.channels, size.height // self.vae_scale, size.width // self.vae_scale

    def num_tokens(self, size: Size) -> int:
        return math.prod(self.noise_shape(size)[1:]) // 4

    def pack(self, noise: Tensor) -> Tensor:
        return patches_to_tokens(noise)

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        return tokens_to_patches(latents, *self.noise_shape(size)[1:])

    def mu(self, scheduler: Any, size: Size, steps: int) -> float | None:
        return resolution_shift(scheduler, self.num_tokens(size))

    def guidance(self, params: DiffusionParams) -> float | None:
        return distilled_guidance(params, self.GUIDANCE if self.distilled else None)

    def inputs(
        self, latents: Tensor, timestep: Tensor, embeds: Sequence[Embeds], size: Size, guidance: float | None
    ) -> dict[str, Any]:
        _, height, width = self.noise_shape(size)
        prompt = stack_prompts(embeds)
        return {
            "hidden_states": latents,
            "timestep": timestep.to(latents.dtype) / 1000,
            "guidance": None if guidance is None else torch.full_like(timestep, guidance),
            "pooled_projections": stack_pooled(embeds),
            "encoder_hidden_states": prompt,
            "txt_ids": prompt.new_zeros(prompt.shape[1], 3),
            "img_ids": grid_ids(height // 2, width // 2).to(prompt),
        }

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        return plain_cfg(with_prompt, without, scale)

    def encode(self, pipeline: Any, prompt: str) -> Embeds:
        embeds, pooled, _ = pipeline.encode_prompt(prompt=[prompt], prompt_2=None)
        return Embeds(embeds[0], pooled[0])

    def decode(self, pipeline: Any, latents: Tensor, size: Size) -> Tensor:
        vae = pipeline.vae
        scaled = self.unpack(latents, size) / vae.config.scaling_factor + vae.config.shift_factor
        return to_uint8(vae.decode(scaled.to(vae.dtype), return_dict=False)[0])
