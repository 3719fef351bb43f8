"""FLUX.2 (dev: distilled guidance; klein: none)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..params import DiffusionParams
from .family import (
    Embeds,
    Size,
    check_text_to_image,
    distilled_guidance,
    image_size,
    plain_cfg,
    stack_prompts,
    to_uint8,
)


class Flux2:
    """Tokens are latent pixels that hold 2 x 2 patches already; ids [batch, tokens, 4]: (time, row, column, text)."""

    TRANSFORMER: ClassVar[str] = "Flux2Transformer2DModel"
    scheduler: Mapping[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True}
    KEEP: ClassVar[tuple[str, ...]] = (
        "proj_out",
        "time_guidance_embed*",
        "context_embedder*",
        "x_embedder*",
        "norm_out*",
        "*stream_modulation*",
    )
    LINEAR_SIGMAS: ClassVar[bool] = True
    MASKED: ClassVar[bool] = False
    GUIDANCE: ClassVar[float] = 4.0
    PIXELS: ClassVar[int] = 1024

    def __init__(self, config: Mapping[str, Any], vae_scale: int) -> None:
        check_text_to_image(config)
        self.channels, self.vae_scale = config["in_channels"], vae_scale
        self.text_width = config["joint_attention_dim"]
        self.pooled_width: int | None = None
        self.distilled = bool(config.get("guidance_embeds", True))

    def size(self, params: DiffusionParams) -> Size:
        return image_size(params, self.PIXELS, 2 * self.vae_scale)

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        return self.channels, size.height // (2 * self.vae_scale), size.width // (2 * self.vae_scale)

    def num_tokens(self, size: Size) -> int:
        return math.prod(self.noise_shape(size)[1:])

    def pack(self, noise: Tensor) -> Tensor:
        return noise.flatten(2).mT

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        return latents.mT.unflatten(2, self.noise_shape(size)[1:])

    def mu(self, scheduler: Any, size: Size, steps: int) -> float | None:
        return _empirical_mu(self.num_tokens(size), steps)

    def guidance(self, params: DiffusionParams) -> float | None:
        return distilled_guidance(params, self.GUIDANCE if self.distilled else None)

    def inputs(
        self, latents: Tensor, timestep: Tensor, embeds: Sequence[Embeds], size: Size, guidance: float | None
    ) -> dict[str, Any]:
        _, height, width = self.noise_shape(size)
        prompt = stack_prompts(embeds)
        ids = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1))
        text = torch.zeros(prompt.shape[1], 4, dtype=torch.int64)
        text[:, 3] = torch.arange(len(text))
        return {
            "hidden_states": latents,
            "timestep": timestep.to(latents.dtype) / 1000,
            "guidance": None if guidance is None else torch.full_like(timestep, guidance),
            "encoder_hidden_states": prompt,
            "txt_ids": text.to(latents.device).expand(len(latents), -1, -1),
            "img_ids": ids.to(latents.device).expand(len(latents), -1, -1),
        }

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        return plain_cfg(with_prompt, without, scale)

    def encode(self, pipeline: Any, prompt: str) -> Embeds:
        return Embeds(pipeline.encode_prompt(prompt=[prompt])[0][0])

    def decode(self, pipeline: Any, latents: Tensor, size: Size) -> Tensor:
        vae = pipeline.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        std, mean = (value[:, None, None].to(latents) for value in (std, vae.bn.running_mean))
        scaled = self.unpack(latents, size) * std + mean
        patches = scaled.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)  # [batch, channels, h, 2, w, 2]
        return to_uint8(vae.decode(patches.flatten(4).flatten(2, 3).to(vae.dtype), return_dict=False)[0])


def _empirical_mu(image_tokens: int, steps: int) -> float:
    """FLUX.2's shift: linear in the tokens at 10 and at 200 steps, and between these linear in the steps."""
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope
