"""Weights on their way: what has arrived of a unit, units that wait for each other, and how much may wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Literal

import torch
from msgspec import Struct, field
from torch import Tensor

from ..quant.scheme import WeightShape, has_kernels
from .checks import FiniteChecks, check_finite, is_finite
from .digest import DigestQueue
from .side_stream import SideStream

Form = Literal["bf16", "fp8", "nvfp4"]
UnitScales = dict[tuple[str, int], Tensor]  # (tensor, shard) -> float32 [1] or [rows of the shard]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# On a GPU the units of a stack wait for each other, so that few launches finish many: as many bytes of buffers in one
# session at the most, beyond which units are finished one by one. A CPU gains nothing: it finishes a unit in its cache.
STAGED_BACKLOG = 3 << 29  # both stacks of a layer of Qwen3-30B-A3B: 1.2e9
STREAMED_BACKLOG = 1 << 30
ALONE_BACKLOG = 1 << 28  # of units that waited for no others


class PendingUnit(Struct):
    """One unit under way, in a run's buffers: scales a shard; `left` counts the tensors that must still come."""

    form: Form
    run: Run
    left: int
    scales: UnitScales = field(default_factory=dict)
    unchecked: list[tuple[str, Tensor]] = field(default_factory=list)  # the name it came under, and what became of it


class Run(Struct):
    """Units first, first + 1, ... of one stack, in buffers [count, ...] in which they lie side by side.

    A weight that is no stack has buffers without that dimension. Shards are fused along rows.
    """

    form: Form
    first: int
    count: int
    matrices: dict[str, Tensor]
    num_bytes: int  # taken from the backlog
    expected: set[int]
    complete: set[int] = field(default_factory=set)
    views: dict[tuple[str, int], Sequence[Tensor]] = field(default_factory=dict)

    def places(self, tensor: str, shard: int, shape: WeightShape) -> Sequence[Tensor]:
        """Where this shard of each unit goes."""
        found = self.views.get((tensor, shard))
        if found is None:
            matrix, rows = self.matrices[tensor], shape.shard_slice(shard)
            found = (matrix[rows],) if shape.units is None else matrix[:, rows].unbind()
            self.views[tensor, shard] = found
        return found

    def parts(self) -> Iterator[range]:
        """Complete units, those side by side together."""
        start = None
        for unit in range(self.first, self.first + self.count + 1):
            if unit in self.complete:
                start = unit if start is None else start
            elif start is not None:
                yield range(start, unit)
                start = None


class Arrival(Struct):
    """Complete units: matrices [units, ...], of a slot that is no stack without that dimension.

    `unchecked`: what may hold NaN or infinity, under the names it came with. `borrowed`: the storage is the sender's;
    `alone`: it is ours, but not of the backlog. `release` is called once nothing of it is needed any more.
    """

    units: range
    form: Form
    matrices: dict[str, Tensor]
    scales: list[UnitScales] = []
    unchecked: list[tuple[str, Tensor]] = []
    borrowed: bool = False
    alone: bool = False
    release: Callable[[], None] = lambda: None

    @property
    def num_bytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices.values())

    def check(self) -> None:
        """Raise `NonFiniteError` that names what is not finite."""
        if self.unchecked and not all(is_finite(matrix) for matrix in self.matrices.values()):
            for name, value in self.unchecked:
                check_finite(name, value)

    def clear(self) -> None:
        """Let go of the memory."""
        self.matrices.clear()
        self.unchecked.clear()


class Backlog:
    """How many bytes of units may wait in one session: for each other, then for a GPU to tell that they are finite.

    `side`: where they are quantized and packed.
    """

    def __init__(self, limit: int = 0, side: SideStream | None = None) -> None:
        self.limit = self.left = limit
        self.side = side or SideStream(torch.device("cpu"))
        self.checks = FiniteChecks(ALONE_BACKLOG)
        self.digests = DigestQueue()
        self._ready: list[Callable[[], None]] = []
        self._ready_bytes = 0
        self._targets: list[Tensor] = []
        self._values: list[Tensor] = []

    def copy_later(self, target: Tensor, value: Tensor) -> None:
        """Copy a sender's tensor with others in one call: `copy_now`."""
        self._targets.append(target)
        self._values.append(value)

    def copy_now(self) -> None:
        if self._targets:
            torch._foreach_copy_(self._targets, self._values)  # pyright: ignore[reportPrivateImportUsage]
            self._targets, self._values = [], []
            with self.side.beside():  # whatever stream the rest comes in, it is computed after these copies
                pass

    def compute_later(self, call: Callable[[], None], num_bytes: int) -> None:
        """Call it on the side stream, with others; it holds as many bytes of buffers until then."""
        self._ready.append(call)
        self._ready_bytes += num_bytes
        if self._ready_bytes > ALONE_BACKLOG:
            self.compute_now()

    def compute_now(self) -> None:
        """Quantize and pack what is ready."""
        self.copy_now()
        ready, self._ready, self._ready_bytes = self._ready, [], 0
        if ready:
            with self.side.beside():
                for call in ready:
                    call()
                self.digests.run()

    def give_back(self) -> None:
        """What comes next in the caller's stream may overwrite what was lent."""
        self.compute_now()
        with self.side.beside():
            self.checks.ask()
        self.side.join()

    def look(self) -> None:
        """Wait for the GPU's word on all that has come; raise `NonFiniteError` if something is not finite."""
        self.compute_now()
        with self.side.beside():
            self.checks.look()

    def take(self, num_bytes: int) -> bool:
        """Whether there is room for as many bytes; they are taken then."""
        if self.left < num_bytes <= self.limit:
            self.look()
        if num_bytes > self.left:
            return False
        self.left -= num_bytes
        return True

    def free(self, num_bytes: int) -> None:
        self.left += num_bytes

    def run_length(self, num_units: int, unit_bytes: int) -> int:
        """How many units of a stack wait for each other: equal runs, as few as the limit allows."""
        most = max(1, min(num_units, self.limit // max(1, unit_bytes)))
        return -(-num_units // -(-num_units // most))


def default_backlog(weight: Tensor, *, streamed: bool) -> int:
    """The limit for slots that live where this packed tensor does."""
    if not has_kernels(weight):
        return 0
    return STREAMED_BACKLOG if streamed else STAGED_BACKLOG


@cache
def form_of(tensor: str, dtype: torch.dtype) -> Form:
    """In which form a weight arrives, as any one of its tensors tells."""
    if tensor == "weight_scale_2" or dtype == torch.uint8 or (tensor, dtype) == ("weight_scale", torch.float8_e4m3fn):
        return "nvfp4"
    return "fp8" if tensor == "weight_scale" or dtype == torch.float8_e4m3fn else "bf16"
