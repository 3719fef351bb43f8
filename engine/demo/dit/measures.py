"""How near a quantized policy is to its BF16 copy, from the same noise."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """dB, float32 [images], of signals [images, ...] whose range is -1 to 1; 100 at the most."""
    errors = (images - references).square().flatten(1).mean(1)
    return -10 * (errors / 4).clamp(min=1e-10).log10()


def rank_correlation(values: Tensor, others: Tensor) -> float:
    """Spearman's: the correlation of ranks, equal values sharing their mean rank; 1 where both have no order."""
    ranks = torch.stack([_ranks(values), _ranks(others)])
    centered = ranks - ranks.mean(1, keepdim=True)
    product = centered.norm(dim=1).prod()
    if product == 0:
        return 1.0 if torch.equal(values, others) else 0.0
    return float(centered[0] @ centered[1] / product)


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[places]


def top_overlap(values: Tensor, others: Tensor, share: float = 0.25) -> float:
    """Share of the best of `others` that is among the best of `values`, too."""
    count = max(1, round(share * len(values)))
    best, theirs = (set(one.topk(count).indices.tolist()) for one in (values, others))
    return len(best & theirs) / count
