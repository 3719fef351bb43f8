"""Who reads the digits: a support vector machine, trained on real ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .digits import load_digits


class Judge:
    """Reads digits. `split` "train" gives the rewards; "held_out" learned from other images and gives none."""

    def __init__(self, split: str = "train") -> None:
        self.machine: Any = _fitted(split)

    def read(self, ink: Tensor) -> Tensor:
        """The digit of every image, int64 [images]; `ink` [images, 8, 8] in 0 to 1."""
        return torch.from_numpy(self.machine.predict(ink.flatten(1).double().numpy()))

    def right(self, ink: Tensor, labels: Tensor) -> Tensor:
        """bool [images]: whether the digit that was asked for is the one that is read."""
        return self.read(ink) == labels

    def rewards(self, ink: Tensor, labels: Tensor) -> Tensor:
        """float32 [images]: the mean ink of an image that is still read as its digit, else 0."""
        return ink.flatten(1).mean(1) * self.right(ink, labels)


@cache
def _fitted(split: str) -> Any:
    from sklearn.svm import SVC

    train, held_out = load_digits()
    images = {"train": train, "held_out": held_out}[split]
    machine = SVC(C=10.0, gamma="scale")
    return machine.fit(images.ink.flatten(1).double().numpy(), images.labels.numpy())
