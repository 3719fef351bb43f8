"""(name, tensor) pairs on their way in: checked, pulled out of foreign iterators, split into shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ..quant import RollmillError
from .errors import ShapeError, TransportError
from .pending import FLOATS
from .plan import SCALE_NAMES, Target


def as_pair(pair: Any) -> tuple[str, Tensor]:
    """Check that a bucket's item is (name, tensor)."""
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor):
        return pair[0], pair[1]
    raise ShapeError(f"a bucket holds (name, tensor) pairs, got {pair!r:.80}")


def with_prefix(name: str, prefix: str) -> str:
    """`prefix` before a name that does not begin with it."""
    return name if name.startswith(prefix) else prefix + name


def pull(source: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """All pairs of a source; whatever it raises becomes a `TransportError` that names the last tensor."""
    last, iterator = "none", iter(source)
    while True:
        try:
            item = next(iterator, None)
        except RollmillError:
            raise
        except Exception as error:  # a foreign iterator may raise anything
            raise TransportError(f"the source failed; last tensor received: {last} ({error!r})") from error
        if item is None:
            return
        pair = as_pair(item)
        last = pair[0]
        yield pair


def is_whole_stack(target: Target, value: Tensor) -> bool:
    """Whether this tensor brings all matrices of a stack at once, not quantized."""
    shape = target.slot.shape
    if target.unit is not None or shape.units is None or shape.cols is None or target.tensor in SCALE_NAMES:
        return False
    expected = (shape.units, shape.cols, shape.num_rows) if target.layout.transposed else shape.matrix
    return tuple(value.shape) == expected and value.dtype in FLOATS


def split(name: str, target: Target, value: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(unit, shard, part) of a tensor that may hold all units stacked and all shards joined along rows."""
    slot = target.slot
    if target.unit is not None and target.shard is not None:
        yield target.unit, target.shard, value
        return
    stacked = slot.shape.units is not None
    if stacked and (value.ndim == 0 or value.shape[0] != slot.shape.units):
        raise ShapeError(f"{name}: expected {slot.shape.units} experts stacked, got {list(value.shape)}")
    for unit, part in enumerate(value if stacked else (value,)):
        for shard in range(len(slot.shape.rows)):
            yield unit, shard, part if part.numel() == 1 else _rows(name, target, part, shard)


def _rows(name: str, target: Target, part: Tensor, shard: int) -> Tensor:
    shape, rows = target.slot.shape, target.layout.rows_first(part)
    if rows.shape[0] != shape.num_rows:
        raise ShapeError(f"{name}: expected {shape.num_rows} rows, got {list(rows.shape)}")
    return target.layout.shard(rows, shape, shard)
