"""scikit-learn's digits as training data: 1,797 grey images of 8 x 8 pixels, in scikit-learn's own wheel."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor

NUM_CLASSES = 10
SIDE = 8  # pixels; a latent's side, too: the model works on pixels, and no VAE stands between
INK = 16.0  # the darkest value of a pixel
HELD_OUT = 0.2


class Split(Struct, frozen=True):
    """`ink`: float32 [images, 8, 8] in 0 (paper) to 1; `labels`: int64 [images]."""

    ink: Tensor
    labels: Tensor


@cache
def load_digits() -> tuple[Split, Split]:
    """(train, held out): the same split always, as many of each digit in both as their sizes allow."""
    from sklearn.datasets import load_digits as load_all
    from sklearn.model_selection import train_test_split

    found: Any = load_all()
    ink = torch.from_numpy(found.images).float() / INK
    labels = torch.from_numpy(found.target).long()
    places = torch.arange(len(labels)).numpy()
    parts = train_test_split(places, test_size=HELD_OUT, random_state=0, stratify=found.target)
    train, held_out = (Split(ink[part], labels[part]) for part in map(torch.as_tensor, parts))
    return train, held_out


def to_signal(ink: Tensor) -> Tensor:
    """Ink in 0 to 1 -> what the model is trained on, -1 to 1."""
    return ink * 2 - 1


def to_ink(signal: Tensor) -> Tensor:
    """What the model made -> ink in 0 to 1, in the 256 levels of a picture: rewards see what people see."""
    return ((signal.float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255
