"""`Choices`: what every choice of a token gave, so that who comes next can sum them in a launch of its own."""

from __future__ import annotations

from msgspec import Struct
from torch import Tensor


class Choices(Struct, frozen=True):
    """BF16 values [num_tokens, top_k, hidden_size], and their float32 weights [num_tokens, top_k].

    They stand for their weighted sum: in the order of choices, in float32, rounded to BF16 at the end.
    """

    values: Tensor
    weights: Tensor

    def sum(self) -> Tensor:
        """BF16 [num_tokens, hidden_size]."""
        from .gpu.grouped_gemm import finalize

        return finalize(self.values, self.weights)


def summed(y: Tensor | Choices) -> Tensor:
    """[num_tokens, hidden_size], whoever is to sum."""
    return y.sum() if isinstance(y, Choices) else y
