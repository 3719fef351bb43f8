"""Where the rows of a transformer with a text and an image stream lie.

    streams:  t0 t0 t1 t1 | i0 i0 i0 i1 i1 i1     (text of all samples, then image of all samples)
    joint:    t0 t0 i0 i0 i0 | t1 t1 i1 i1 i1     (a sample's whole sequence, as attention reads it)

Of one sample they are the same. Blocks with one stream see joint rows: `text` is then the whole sequence, `image` 0.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl
from msgspec import Struct
from torch import Tensor


class Streams(Struct, frozen=True):
    """Samples, and tokens of each stream in a sample."""

    batch: int
    text: int
    image: int

    @property
    def text_rows(self) -> int:
        return self.batch * self.text

    @property
    def num_rows(self) -> int:
        return self.batch * (self.text + self.image)

    @property
    def parts(self) -> tuple[slice, slice]:
        """Rows of text and of image."""
        return slice(0, self.text_rows), slice(self.text_rows, self.num_rows)

    @property
    def joined(self) -> Streams:
        """The same rows as one stream."""
        return Streams(self.batch, self.text + self.image, 0)

    def join(self, rows: Tensor) -> Tensor:
        """[num_rows, ...] of two streams -> joint rows."""
        if self.batch == 1:
            return rows
        joint = rows.new_empty(self.batch, self.text + self.image, *rows.shape[1:])
        joint[:, : self.text] = rows[: self.text_rows].view(self.batch, self.text, *rows.shape[1:])
        joint[:, self.text :] = rows[self.text_rows :].view(self.batch, self.image, *rows.shape[1:])
        return joint.flatten(0, 1)


@triton.jit
def find_row(row, batch, text, image):
    """Row of the streams -> its stream (0: text), its sample and its position in the sample's joint sequence."""
    is_text = row < batch * text
    local = tl.where(is_text, row, row - batch * text)
    length = tl.maximum(tl.where(is_text, text, image), 1)  # of one stream there is no other, beyond the last row
    sample = local // length
    position = local - sample * length + tl.where(is_text, 0, text)
    return tl.where(is_text, 0, 1), sample, position
