"""What goes into a linear: BF16 rows, FP8 codes, or both where linears beside each other read different ones."""

from __future__ import annotations

import torch
from msgspec import Struct
from torch import Tensor


class Activations(Struct, frozen=True):
    """`rows`: BF16 [num_rows, K]; `codes`: E4M3 [num_rows, K] with decode scales `scale`, float32 [num_rows]."""

    rows: Tensor | None
    codes: Tensor | None = None
    scale: Tensor | None = None

    def __getitem__(self, part: slice) -> Activations:
        """Some of the rows."""
        return Activations(*(None if one is None else one[part] for one in (self.rows, self.codes, self.scale)))

    @property
    def device(self) -> torch.device:
        present = self.rows if self.rows is not None else self.codes
        assert present is not None
        return present.device
