"""Wan 2.1 and 2.2: videos, true classifier-free guidance; 2.2 A14B has a second transformer for low noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ...errors import RequestError
from ..params import DiffusionParams
from .family import (
    Embeds,
    Size,
    check_text_to_image,
    distilled_guidance,
    plain_cfg,
    stack_prompts,
    to_uint8,
    unnormalized,
)


class Wan:
    """Latents [channels, frames, height, width]; the VAE makes one latent frame of the first frame and of every 4."""

    TRANSFORMER: ClassVar[str] = "WanTransformer3DModel"
    scheduler: Mapping[str, Any] = {"shift": 3.0}
    KEEP: ClassVar[tuple[str, ...]] = ("patch_embedding*", "condition_embedder*", "proj_out")
    LINEAR_SIGMAS: ClassVar[bool] = False
    MASKED: ClassVar[bool] = False
    PIXELS: ClassVar[tuple[int, int]] = (480, 832)
    FRAMES: ClassVar[int] = 4
    MAX_TEXT: ClassVar[int] = 512  # as the pipeline's call has it; `encode_prompt` alone would make 226

    def __init__(self, config: Mapping[str, Any], vae_scale: int) -> None:
        check_text_to_image(config)
        self.channels, self.vae_scale = config["in_channels"], vae_scale
        self.text_width = config["text_dim"]
        self.pooled_width: int | None = None
        self.patch = config["patch_size"]

    def size(self, params: DiffusionParams) -> Size:
        size = Size(params.height or self.PIXELS[0], params.width or self.PIXELS[1], params.num_frames)
        high, wide = self.patch[1] * self.vae_scale, self.patch[2] * self.vae_scale
        if size.height % high or size.width % wide or size.frames % self.FRAMES != 1:
            raise RequestError(
                f"{size.frames} frames of {size.height} x {size.width}: this model makes 1 + {self.FRAMES}k frames, "
                f"heights a multiple of {high} and widths of {wide}"
            )
        return size

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        frames = (size.frames - 1) // self.FRAMES + 1
        return self.channels, frames, size.height // self.vae_scale, size.width // self.vae_scale

    def num_tokens(self, size: Size) -> int:
        return math.prod(self.noise_shape(size)[1:]) // math.prod(self.patch)

    def pack(self, noise: Tensor) -> Tensor:
        return noise

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def mu(self, scheduler: Any, size: Size, steps: int) -> float | None:
        return None

    def guidance(self, params: DiffusionParams) -> float | None:
        return distilled_guidance(params, None)

    def inputs(
        self, latents: Tensor, timestep: Tensor, embeds: Sequence[Embeds], size: Size, guidance: float | None
    ) -> dict[str, Any]:
        return {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": stack_prompts(embeds)}

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        return plain_cfg(with_prompt, without, scale)

    def encode(self, pipeline: Any, prompt: str) -> Embeds:
        embeds, _ = pipeline.encode_prompt(
            prompt=[prompt], do_classifier_free_guidance=False, max_sequence_length=self.MAX_TEXT
        )
        return Embeds(embeds[0])

    def decode(self, pipeline: Any, latents: Tensor, size: Size) -> Tensor:
        vae = pipeline.vae
        return to_uint8(vae.decode(unnormalized(vae, latents.to(vae.dtype)), return_dict=False)[0])
