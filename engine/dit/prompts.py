"""What a user gives as prompts -> one checked `Embeds` a prompt, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from ..errors import RequestError
from .families import Embeds, Family
from .params import DiffusionParams

DiffusionPrompts = str | Embeds | Sequence[str] | Sequence[Embeds]


def embed_prompts(
    prompts: DiffusionPrompts,
    params: DiffusionParams,
    family: Family,
    pipeline: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Embeds]:
    """Text through the encoders of `pipeline` (None: there are none), embeds as they are; on `device`, in `dtype`.

    `RequestError` for prompts that are neither, text without encoders, and embeds that the model cannot read.
    """
    listed = [prompts] if isinstance(prompts, str | Embeds) else list(prompts)
    texts = [one for one in listed if isinstance(one, str)]
    embeds = [one for one in listed if isinstance(one, Embeds)]
    if not listed or listed not in (texts, embeds):
        kinds = ", ".join(sorted({type(one).__name__ for one in listed})) or "nothing"
        raise RequestError(f"prompts are text, or Embeds, at least one and all of one kind; got {kinds}")
    if texts:
        embeds = _encode(texts, params, family, pipeline)
    elif params.negative_prompt is not None:
        raise RequestError("negative_prompt is for prompts of text: give Embeds(prompt, ..., negative=Embeds(...))")
    for place, one in enumerate(embeds):
        check_embeds(one, family, f"prompt {place}", needs_negative=params.wants_cfg)
    return [place_embeds(one, device, dtype) for one in embeds]


@torch.no_grad()
def _encode(texts: Sequence[str], params: DiffusionParams, family: Family, pipeline: Any) -> list[Embeds]:
    """One by one, so that no prompt depends on the others' lengths."""
    if getattr(pipeline, "text_encoder", None) is None:
        raise RequestError("there is no text encoder here: give Embeds, or open a pipeline's folder that has one")
    embeds = [family.encode(pipeline, text) for text in texts]
    if not params.wants_cfg:
        return embeds
    negative = family.encode(pipeline, params.negative_prompt or "")
    return [replace(one, negative=negative) for one in embeds]


def check_embeds(embeds: Embeds, family: Family, name: str, *, needs_negative: bool = False) -> None:
    """`RequestError` unless `family` can read them."""
    _check_matrix(embeds.prompt, family.text_width, name)
    _check_pooled(embeds.pooled, family.pooled_width, name)
    if embeds.mask is not None:
        _check_mask(embeds, name, masked=family.MASKED)
    _check_finite({"prompt": embeds.prompt, "pooled": embeds.pooled}, name)
    if embeds.negative is not None:
        if embeds.negative.negative is not None:
            raise RequestError(f"{name}: negative embeds have no negative embeds of their own")
        check_embeds(embeds.negative, family, f"{name}, negative")
    elif needs_negative:
        raise RequestError(f"{name}: true_cfg_scale needs Embeds(prompt, ..., negative=Embeds(...))")


def _check_matrix(prompt: Tensor, width: int, name: str) -> None:
    fits = isinstance(prompt, Tensor) and prompt.is_floating_point()
    if not fits or prompt.ndim != 2 or prompt.shape[0] == 0 or prompt.shape[1] != width:
        raise RequestError(f"{name}: embeds are floating-point [num_tokens, {width}] for one prompt{_got(prompt)}")


def _check_pooled(pooled: Tensor | None, width: int | None, name: str) -> None:
    if width is None:
        if pooled is not None:
            raise RequestError(f"{name}: this model reads no pooled embedding; leave it at None")
    elif not isinstance(pooled, Tensor) or not pooled.is_floating_point() or pooled.shape != (width,):
        raise RequestError(f"{name}: this model reads a pooled embedding, floating-point [{width}]{_got(pooled)}")


def _check_mask(embeds: Embeds, name: str, *, masked: bool) -> None:
    if not masked:
        raise RequestError(f"{name}: this model reads no mask; give the embeds without padding, or as it was trained")
    mask = embeds.mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != embeds.prompt.shape[:1]:
        raise RequestError(f"{name}: a mask is bool [{embeds.prompt.shape[0]}], as the embeds are long{_got(mask)}")
    if not bool(mask.any()):
        raise RequestError(f"{name}: the mask hides every token")


def _check_finite(parts: Mapping[str, Tensor | None], name: str) -> None:
    broken = [part for part, tensor in parts.items() if tensor is not None and not bool(tensor.isfinite().all())]
    if broken:
        raise RequestError(f"{name}: embeds hold NaN or infinity in {', '.join(broken)}")


def _got(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"; got {type(value).__name__}"
    more = " (a batch of one? give the first)" if value.ndim > 1 and value.shape[0] == 1 else ""
    return f"; got {str(value.dtype).removeprefix('torch.')} {list(value.shape)}{more}"


def place_embeds(embeds: Embeds, device: torch.device, dtype: torch.dtype) -> Embeds:
    """On `device`, in `dtype`; the same object where it is there already, so that groups share it."""
    negative = None if embeds.negative is None else place_embeds(embeds.negative, device, dtype)
    parts = {
        "prompt": embeds.prompt.to(device, dtype),
        "pooled": None if embeds.pooled is None else embeds.pooled.to(device, dtype),
        "mask": None if embeds.mask is None else embeds.mask.to(device),
        "negative": negative,
    }
    same = all(getattr(embeds, name) is value for name, value in parts.items())
    return embeds if same else Embeds(**parts)
