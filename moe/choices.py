"""`Choices`: what every choice of a token gave, so that who comes next can sum them in a launch of its own."""

from __future__ import annotations

from msgspec import Struct
from torch import Tensor


class Choices(Struct, frozen=True):
    """They stand for their weighted sum: in the order of choices, in float32, rounded to BF16 at the end.

    values BF16 [rows, hidden_size], weights float32 [num_tokens, top_k]; `places` int32 [num_tokens, top_k] says in
    which row of values a choice lies, where they do not lie token by token.
    """

    values: Tensor
    weights: Tensor
    places: Tensor | None = None

    def sum(self) -> Tensor:
        """BF16 [num_tokens, hidden_size]."""
        from .gpu.finalize import finalize

        return finalize(self.values, self.weights, self.places)


def summed(y: Tensor | Choices) -> Tensor:
    """[num_tokens, hidden_size], whoever is to sum."""
    return y.sum() if isinstance(y, Choices) else y
