"""Where kernels are launched."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_own_device(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Triton launches on the current device: make it that of the first tensor."""

    @wraps(launch)
    def guarded(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return launch(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(first, *args, **kwargs)

    return guarded
