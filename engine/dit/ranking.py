"""The best and the worst of a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError, StaleVersionError
from .sample import DiffusionSample

Reward = Callable[[Sequence[DiffusionSample]], Sequence[float] | Tensor]


def check_keep(keep: tuple[int, int], pool: int) -> None:
    """`RequestError` unless `keep` (numbers of best and worst) is a part of the pool."""
    best, worst = keep
    if best < 0 or worst < 0 or not 0 < best + worst <= pool:
        raise RequestError(f"keep={keep} of a pool of {pool}: numbers of best and worst, at most the pool in all")


def read_rewards(given: Any, count: int) -> Tensor:
    """float32 [count] on the host; `RequestError` unless they are finite numbers, one a sample."""
    try:
        rewards = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"reward returned no numbers: {error}") from error
    if rewards.shape != (count,):
        raise RequestError(f"reward returned numbers of shape {list(rewards.shape)} for {count} samples")
    if not bool(rewards.isfinite().all()):
        places = (~rewards.isfinite()).nonzero().flatten().tolist()
        raise RequestError(f"reward returned numbers that are not finite for samples {places[:10]}")
    return rewards


def check_versions(ranked: Sequence[DiffusionSample], again: Sequence[DiffusionSample]) -> None:
    """`StaleVersionError` unless samples were computed again with the weights that they were ranked with."""
    for before, after in zip(ranked, again, strict=True):
        if before.weight_version != after.weight_version:
            raise StaleVersionError(
                f"prompt {before.prompt_index}: the pool was ranked with version {before.weight_version!r}, and "
                f"its best and worst were computed again with {after.weight_version!r}: swap before or after explore"
            )


def extremes(rewards: Tensor, keep: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Places of the best, best first, and of the worst, worst first; of equals the first ranks higher."""
    order: list[int] = rewards.argsort(descending=True, stable=True).tolist()
    return order[: keep[0]], order[::-1][: keep[1]]
