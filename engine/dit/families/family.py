"""`Family`: what differs between the models of diffusers: latents, inputs, guidance, text and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from msgspec import Struct
from torch import Tensor

from ....quant import UnsupportedError
from ...errors import RequestError
from ..params import DiffusionParams


class Size(Struct, frozen=True):
    """Of an image or a video, in pixels and frames."""

    height: int
    width: int
    frames: int = 1


class Embeds(Struct, frozen=True):
    """One prompt, encoded. `prompt`: [num_tokens, features]; `pooled`: [features] for models that read one; `mask`:
    bool [num_tokens] for models that read one; `negative`: the prompt to steer away from, with `true_cfg_scale`."""

    prompt: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    negative: Embeds | None = None


class Family(Protocol):
    """One architecture. It is made from a transformer's config and the factor by which its VAE shrinks an image.

    Latents are handled as the transformer takes them ("packed"): [batch, ...]; noise is drawn in the shape in which
    diffusers' pipeline draws it.
    """

    TRANSFORMER: ClassVar[str]  # diffusers' class
    KEEP: ClassVar[tuple[str, ...]]  # modules that stay in BF16 where BF16 weights are quantized: ModelOpt's recipe
    LINEAR_SIGMAS: ClassVar[bool]  # the pipeline hands sigmas 1 ... 1 / steps to the scheduler
    MASKED: ClassVar[bool]  # reads a mask of the prompt's tokens
    text_width: int  # of the prompt's embeddings
    pooled_width: int | None  # of the pooled embedding; None: reads none
    scheduler: Mapping[str, Any]  # FlowMatchEulerDiscreteScheduler's config where no pipeline brings one

    def __init__(self, config: Mapping[str, Any], vae_scale: int) -> None: ...

    def size(self, params: DiffusionParams) -> Size:
        """The size to make, defaults filled in; `RequestError` if the model cannot make it."""
        ...

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        """Of one sample."""
        ...

    def num_tokens(self, size: Size) -> int:
        """Of the image or video, in the transformer's attention."""
        ...

    def pack(self, noise: Tensor) -> Tensor:
        """[batch, *noise_shape] -> latents as the transformer takes them."""
        ...

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        """The inverse of `pack`."""
        ...

    def mu(self, scheduler: Any, size: Size, steps: int) -> float | None:
        """What the scheduler's dynamic shift asks for."""
        ...

    def guidance(self, params: DiffusionParams) -> float | None:
        """The scale that is fed to the model; `RequestError` if one is asked for and the model takes none."""
        ...

    def inputs(
        self, latents: Tensor, timestep: Tensor, embeds: Sequence[Embeds], size: Size, guidance: float | None
    ) -> dict[str, Any]:
        """Keywords of the transformer's forward. `timestep`: float32 [batch], 0 to 1000; embeds one a sample."""
        ...

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance."""
        ...

    def encode(self, pipeline: Any, prompt: str) -> Embeds:
        """A prompt through the pipeline's text encoders."""
        ...

    def decode(self, pipeline: Any, latents: Tensor, size: Size) -> Tensor:
        """Packed latents -> uint8 [batch, height, width, 3], or [batch, frames, height, width, 3]."""
        ...


def check_text_to_image(config: Mapping[str, Any]) -> None:
    """`UnsupportedError` for a model that reads an image beside its latents (Fill, I2V)."""
    taken, made = config["in_channels"], config.get("out_channels")
    if made is not None and made != taken:
        raise UnsupportedError(
            f"rollouts of this {config.get('_class_name')}",
            [f"it takes {taken} channels and makes {made}: only models from text alone are built"],
        )


def image_size(params: DiffusionParams, pixels: int, multiple: int) -> Size:
    """Height and width, `pixels` by default; both multiples of what latents can hold."""
    size = Size(params.height or pixels, params.width or pixels)
    if size.height % multiple or size.width % multiple or params.num_frames != 1:
        asked = f"{size.height} x {size.width}, {params.num_frames} frames"
        raise RequestError(f"{asked}: this model makes single images of multiples of {multiple} pixels")
    return size


def distilled_guidance(params: DiffusionParams, default: float | None) -> float | None:
    """The scale to feed; `default` None: the model takes none."""
    if default is None and params.guidance_scale is not None:
        raise RequestError(
            f"guidance_scale={params.guidance_scale}, but this model was not distilled with one; "
            "leave it at None, or use true_cfg_scale with a negative prompt"
        )
    return default if params.guidance_scale is None else params.guidance_scale


def stack_prompts(embeds: Sequence[Embeds]) -> Tensor:
    """[batch, num_tokens, features]"""
    return torch.stack([one.prompt for one in embeds])


def stack_pooled(embeds: Sequence[Embeds]) -> Tensor:
    """[batch, features]; that every prompt has one was checked before."""
    return torch.stack([one.pooled for one in embeds if one.pooled is not None])


def plain_cfg(with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598)."""
    return without + scale * (with_prompt - without)


def to_uint8(image: Tensor) -> Tensor:
    """[batch, 3, ...] in -1 to 1 -> uint8 [batch, ..., 3] on the host, rounded as diffusers' image processor does."""
    scaled = (image.float() / 2 + 0.5).clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).movedim(1, -1).cpu()


def unnormalized(vae: Any, latents: Tensor) -> Tensor:
    """latents * std + mean by channel, for VAEs that tell them: [batch, channels, frames, height, width]."""
    std, mean = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
        for values in (vae.config.latents_std, vae.config.latents_mean)
    )
    return latents * std + mean
