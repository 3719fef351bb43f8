"""`Likelihoods`: softmax over a vocabulary, summed in an order that does not depend on batch or threads."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # tokens summed in float32; sums of blocks are added in float64


class Likelihoods:
    """softmax of logits float32 [batch, vocab], kept as exp(logits - peak) in blocks [batch, num_blocks, BLOCK].

    A row's numbers are the same bits whatever the other rows are. Logits of -inf have probability 0; where a row
    holds NaN or +inf, or nothing but -inf, all of its log-probs are NaN.
    """

    def __init__(self, logits: Tensor) -> None:
        batch, vocab = logits.shape
        self.logits = logits
        self.peak = logits.amax(-1, keepdim=True)
        weights = logits.new_empty(batch, -(-vocab // BLOCK) * BLOCK)
        weights[:, vocab:] = float("-inf")
        torch.sub(logits, self.peak, out=weights[:, :vocab])
        self.blocks = weights.exp_().unflatten(-1, (-1, BLOCK))
        self.sums = self.blocks.sum(-1).double()  # [batch, num_blocks]
        self.totals = self.sums.sum(-1, keepdim=True)  # [batch, 1], of exp(logits - peak)

    def logprobs(self, ids: Tensor) -> Tensor:
        """float32 [batch, count] of token ids int64 [batch, count]."""
        return ((self.logits.gather(-1, ids) - self.peak).double() - self.totals.log()).float()

    def top(self, row: int, count: int) -> tuple[Tensor, Tensor]:
        """Ids int32 and log-probs float32, both [count], of the likeliest tokens of one row."""
        values, ids = self.logits[row].topk(count)
        return ids.int().cpu(), ((values - self.peak[row]).double() - self.totals[row].log()).float().cpu()

    def best(self) -> Tensor:
        """The likeliest token of each row, the first of equals: ids int64 [batch]."""
        if self.logits.shape[-1] % BLOCK:
            return self.logits.argmax(-1)
        blocks = self.logits.unflatten(-1, (-1, BLOCK))
        block = blocks.amax(-1).argmax(-1)  # a maximum is found much faster than its place
        return block * BLOCK + blocks[torch.arange(len(block), device=block.device), block].argmax(-1)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Inverse-CDF sampling: uniforms float64 [batch] in [0, 1) -> ids int64 [batch].

        A first search over the sums of blocks and a second one within a block: no cumulative sum over a vocabulary.
        """
        block, rest = _search(self.sums, uniforms[:, None] * self.totals)
        inner = self.blocks[torch.arange(len(block), device=block.device), block[:, 0]].double()
        within, _ = _search(inner, rest / self.sums.gather(-1, block) * inner.sum(-1, keepdim=True))
        return (block * BLOCK + within)[:, 0].clamp_(max=self.logits.shape[-1] - 1)


def _search(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where `target` [batch, 1] falls in the cumulative sum of weights [batch, n], and by how much it goes beyond."""
    cdf = weights.cumsum(-1)
    last = cdf[:, -1:]
    below = torch.minimum(target, last.nextafter(torch.zeros_like(last)))  # rounding must not reach a zero weight
    at = torch.searchsorted(cdf, below, right=True).clamp_(max=weights.shape[-1] - 1)  # NaN is beyond all
    before = cdf.gather(-1, at) - weights.gather(-1, at)
    return at, (below - before).clamp_(min=0)
