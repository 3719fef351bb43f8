"""The demo's model: FLUX.1's architecture at 2.3 M parameters, trained on digits once and kept in a cache folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..cached_folder import make_once
from .digits import SIDE, Split, load_digits, to_signal
from .prompts import ANY, POOLED_FEATURES, TEXT_FEATURES, make_tables

HEADS, HEAD_DIM = 2, 64
GRID = SIDE // 2  # tokens a side: a token is a 2 x 2 patch
ARCHITECTURE: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT_FEATURES,
    "pooled_projection_dim": POOLED_FEATURES,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}


class Recipe(msgspec.Struct, frozen=True):
    """How the model is trained: about 120 seconds of one core. Another recipe is another folder in the cache."""

    iterations: int = 760
    batch: int = 64
    lr: float = 2.5e-3
    warmup: int = 40
    weight_decay: float = 0.01
    class_dropout: float = 0.1
    ema: float = 0.99
    seed: int = 0

    @property
    def digest(self) -> str:
        """Of the recipe and the architecture."""
        return hashlib.sha256(msgspec.json.encode([self, dict(ARCHITECTURE)])).hexdigest()[:10]


def make_flux() -> Any:
    """The untrained model, float32, from torch's global generator."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel(**ARCHITECTURE)


def build_model(cache: Path, log: Callable[[str], None], recipe: Recipe | None = None) -> Path:
    """Folder of the trained transformer in diffusers' layout (BF16 safetensors); trained at the first call only."""
    recipe = recipe or Recipe()
    folder = cache / f"flux-digits-{recipe.digest}"

    def write(building: Path) -> None:
        model = train(recipe, log)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        model.save_pretrained(building)

    if make_once(folder, {**msgspec.to_builtins(recipe), "digest": recipe.digest}, write):
        log(f"saved {folder}")
    return folder


def train(recipe: Recipe, log: Callable[[str], None]) -> Any:
    """Rectified flow on the train split; returns the model with the averaged weights."""
    torch.manual_seed(recipe.seed)
    model = make_flux()
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate(recipe, done))
    images, _ = load_digits()
    for done in range(1, recipe.iterations + 1):
        loss = flow_loss(model, images, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        _follow(average, model, min(recipe.ema, done / (done + 10)))
        if done % 40 == 0 or done == recipe.iterations:
            log(f"training the digits model: {done} of {recipe.iterations}, loss {loss.item():.3f}")
    model.load_state_dict(average)
    return model.eval()


def _rate(recipe: Recipe, done: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    return min(1.0, (done + 1) / recipe.warmup) * (1 + math.cos(math.pi * done / recipe.iterations)) / 2


@torch.no_grad()
def _follow(average: Mapping[str, Tensor], model: Any, decay: float) -> None:
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1 - decay)


def flow_loss(model: Any, images: Split, recipe: Recipe) -> Tensor:
    """Mean (velocity - (noise - clean))^2 at logit-normal times (arXiv:2403.03206), of one random batch."""
    rows = torch.randint(len(images.labels), (recipe.batch,))
    clean = pack(to_signal(images.ink[rows]))
    noise = torch.randn_like(clean)
    sigma = torch.randn(recipe.batch).sigmoid()
    latents = torch.lerp(clean, noise, sigma[:, None, None])
    dropped = torch.rand(recipe.batch) < recipe.class_dropout
    labels = torch.where(dropped, ANY, images.labels[rows])
    return (velocity(model, latents, sigma, labels) - (noise - clean)).square().mean()


def velocity(model: Any, latents: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """[batch, 16, 4] of latents [batch, 16, 4], sigma [batch] in 0 to 1 and labels [batch], in the model's dtype."""
    prompts, pooled = (table.to(latents)[labels] for table in make_tables())
    rows, cols = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, cols], -1).flatten(0, 1)
    return model(
        hidden_states=latents,
        timestep=sigma,
        encoder_hidden_states=prompts,
        pooled_projections=pooled,
        txt_ids=latents.new_zeros(prompts.shape[1], 3),
        img_ids=places.to(latents),
        return_dict=False,
    )[0]


def pack(signal: Tensor) -> Tensor:
    """[batch, 8, 8] -> tokens [batch, 16, 4], a token a 2 x 2 patch, as FLUX packs latents."""
    return signal.unflatten(2, (GRID, 2)).unflatten(1, (GRID, 2)).transpose(2, 3).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor) -> Tensor:
    """[..., 16, 4] -> [..., 8, 8]: the inverse."""
    grid = tokens.unflatten(-2, (GRID, GRID)).unflatten(-1, (2, 2))  # [..., row, col, 2, 2]
    return grid.transpose(-3, -2).flatten(-2).flatten(-3, -2)
