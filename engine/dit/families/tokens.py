"""Latent images as token rows, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def patches_to_tokens(image: Tensor) -> Tensor:
    """[batch, channels, height, width] -> [batch, height / 2 * width / 2, channels * 4]: a token is a 2 x 2 patch."""
    patches = image.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [batch, channels, h, 2, w, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def tokens_to_patches(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse: [batch, height / 2 * width / 2, channels * 4] -> [batch, channels, height, width]."""
    grid = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))  # [batch, h, w, channels, 2, 2]
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def grid_ids(height: int, width: int) -> Tensor:
    """float32 [height * width, 3]: (0, row, column) of every token."""
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, cols], -1).flatten(0, 1).float()
