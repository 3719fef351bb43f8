"""Qwen-Image: true classifier-free guidance, its result rescaled to the norm of the prompted prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..params import DiffusionParams
from ..schedule import resolution_shift
from .family import Embeds, Size, distilled_guidance, image_size, plain_cfg, stack_prompts, to_uint8, unnormalized
from .tokens import patches_to_tokens, tokens_to_patches


class QwenImage:
    """Tokens of 2 x 2 latent pixels; text of any length, without padding."""

    TRANSFORMER: ClassVar[str] = "QwenImageTransformer2DModel"
    scheduler: Mapping[str, Any] = {
        "use_dynamic_shifting": True,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    }
    KEEP: ClassVar[tuple[str, ...]] = ("img_in", "txt_in", "time_text_embed*", "norm_out*", "proj_out")
    LINEAR_SIGMAS: ClassVar[bool] = True
    MASKED: ClassVar[bool] = True
    PIXELS: ClassVar[int] = 1024
    MAX_TEXT: ClassVar[int] = 512  # as the pipeline's call has it; `encode_prompt` alone would make 1024

    def __init__(self, config: Mapping[str, Any], vae_scale: int) -> None:
        self.channels, self.vae_scale = config["in_channels"] // 4, vae_scale
        self.text_width = config["joint_attention_dim"]
        self.pooled_width: int | None = None
        self.distilled = bool(config.get("guidance_embeds", False))

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
        return distilled_guidance(params, 1.0 if self.distilled else None)

    def inputs(
        self, latents: Tensor, timestep: Tensor, embeds: Sequence[Embeds], size: Size, guidance: float | None
    ) -> dict[str, Any]:
        _, height, width = self.noise_shape(size)
        masks = [one.mask for one in embeds if one.mask is not None]
        return {
            "hidden_states": latents,
            "timestep": timestep.to(latents.dtype) / 1000,
            "guidance": None if guidance is None else torch.full_like(timestep, guidance),
            "encoder_hidden_states": stack_prompts(embeds),
            "encoder_hidden_states_mask": torch.stack(masks) if masks else None,
            "img_shapes": [[(1, height // 2, width // 2)]] * len(latents),
        }

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        guided = plain_cfg(with_prompt, without, scale)
        return guided * (with_prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def encode(self, pipeline: Any, prompt: str) -> Embeds:
        embeds, mask = pipeline.encode_prompt(prompt=[prompt], max_sequence_length=self.MAX_TEXT)
        return Embeds(embeds[0] if mask is None else embeds[0][mask[0].bool()])

    def decode(self, pipeline: Any, latents: Tensor, size: Size) -> Tensor:
        vae = pipeline.vae
        image = self.unpack(latents, size)[:, :, None].to(vae.dtype)  # one frame
        return to_uint8(vae.decode(unnormalized(vae, image), return_dict=False)[0][:, :, 0])
