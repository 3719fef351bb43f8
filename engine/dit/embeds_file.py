"""A safetensors file of encoded prompts -> `Embeds`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...quant import ModelError
from .families import Embeds

PARTS = {"prompt": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_embeds_mask"}
DIMS = {"prompt": 3, "pooled": 2, "mask": 2}
NEGATIVE = "negative_"
KEYS = tuple(start + key for start in ("", NEGATIVE) for key in PARTS.values())


def read_embeds(file: Path) -> list[Embeds]:
    """Prompts as diffusers' pipelines name them: `prompt_embeds` [n, num_tokens, dim], and where the model reads them
    `pooled_prompt_embeds` [n, dim], `prompt_embeds_mask` [n, num_tokens]; each also as `negative_...`, n or 1 of them.

    Raises `ModelError` for a file that is none, other keys, or other shapes.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is no readable safetensors file: {error}") from error
    unknown = sorted(tensors.keys() - set(KEYS))
    if unknown or "prompt_embeds" not in tensors:
        raise ModelError(f"{file.name} holds {sorted(tensors)}; embeds are prompt_embeds and, as needed, {KEYS[1:]}")
    count = len(tensors["prompt_embeds"]) if tensors["prompt_embeds"].ndim else 0
    positive = _parts(file.name, tensors, "", count)
    negative = _parts(file.name, tensors, NEGATIVE, count)
    if negative and "prompt" not in negative:
        raise ModelError(f"{file.name} holds {NEGATIVE} keys without {NEGATIVE}prompt_embeds")
    return [_embeds(positive, i, _embeds(negative, i) if negative else None) for i in range(count)]


def save_embeds(file: Path, embeds: Sequence[Embeds]) -> None:
    """Write prompts of equal shapes, to be read by `read_embeds`."""
    import torch

    tensors = {}
    for start, members in (("", embeds), (NEGATIVE, [one.negative for one in embeds if one.negative is not None])):
        for part, key in PARTS.items():
            values = [getattr(one, part) for one in members]
            if values and values[0] is not None:
                tensors[start + key] = torch.stack(values).cpu().contiguous()
    save_file(tensors, file)


def _embeds(parts: Mapping[str, Tensor], index: int, negative: Embeds | None = None) -> Embeds:
    chosen = {part: value[index if len(value) > 1 else 0] for part, value in parts.items()}
    return Embeds(**chosen, negative=negative)


def _parts(name: str, tensors: Mapping[str, Tensor], start: str, count: int) -> dict[str, Tensor]:
    parts = {part: tensors[start + key] for part, key in PARTS.items() if start + key in tensors}
    for part, value in parts.items():
        counts = (count,) if not start else (count, 1)
        if value.ndim != DIMS[part] or len(value) not in counts or not count:
            wanted = {"prompt": "[n, num_tokens, dim]", "pooled": "[n, dim]", "mask": "[n, num_tokens]"}[part]
            raise ModelError(f"{name}: {start}{PARTS[part]} is {list(value.shape)}, not {wanted} with n = {count}")
    if "mask" in parts:
        parts["mask"] = parts["mask"].bool()
    return parts
