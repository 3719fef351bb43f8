"""FLUX.1-dev's shape with random weights, which come tensor by tensor out of one buffer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor

from rollmill.engine.dit import engine as diffusion_engine
from rollmill.engine.dit.transformer import empty_model

FLUX1_DEV = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
WEIGHT_STD, STEP = 0.02, 65521  # every tensor begins elsewhere in the buffer


class RandomFlux:
    """Yields every tensor of the model: matrices and biases are views of one buffer, norms are ones. `sign` -1: other
    values of the same bytes."""

    def __init__(self, config: Mapping[str, Any], device: str = "cuda", sign: int = 1) -> None:
        self.shapes = {name: tuple(value.shape) for name, value in empty_model(config).state_dict().items()}
        largest = max(torch.Size(shape).numel() for shape in self.shapes.values())
        self.buffer = torch.empty(largest + STEP * len(self.shapes), dtype=torch.bfloat16, device=device)
        self.buffer.normal_(0, WEIGHT_STD, generator=torch.Generator(device).manual_seed(0)).mul_(sign)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for i, (name, shape) in enumerate(self.shapes.items()):
            part = self.buffer[i * STEP :][: torch.Size(shape).numel()].view(shape)
            yield name, torch.ones_like(part) if ".norm_" in name and len(shape) == 1 else part


class Stored(Struct, frozen=True):
    config: Mapping[str, Any]
    source: Any
    tensor_names: frozenset[str]
    plan: None = None


class RandomCheckpoint:
    """A folder with a config.json and nothing else."""

    def __init__(self, path: str | Path, config: Any) -> None:
        read = json.loads((Path(path) / "config.json").read_text())
        self.folder, self.base, self.model_index = None, None, {}
        self.transformers = {"transformer": Stored(read, RandomFlux(read, config.device), frozenset())}

    def pipeline(self, **_: Any) -> None:
        return None


def use_random_weights(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write the config into `folder`; engines opened from it get random weights."""
    config = FLUX1_DEV | changes
    (folder / "config.json").write_text(json.dumps(config))
    diffusion_engine.DiffusionCheckpoint = RandomCheckpoint  # pyright: ignore[reportAttributeAccessIssue]
    return config
