"""`Mirror`: the packed bytes being served, once more in host memory, to put back what a failed swap has overwritten."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..quant import WeightSlot
from .errors import StagingMemoryError

log = logging.getLogger("rollmill")

SLAB = 1 << 28  # bytes; a power of two, as torch rounds pinned memory up to
PIECE = 1 << 25  # bytes that a running step's tokens may have to wait for: a GPU copies to its host one after the other


class Mirror:
    """Slabs of host memory (pinned where the slots live on a GPU) that hold every slot's packed tensors and scales.

    `renew` copies in a thread of its own, on a stream of its own; `complete` waits for it; `restore` puts bytes back.
    Between `renew` and `complete` nobody may write the slots: whoever does calls `complete` first.
    """

    def __init__(self, slots: Sequence[WeightSlot]) -> None:
        self.slots = tuple(slots)
        first = next((t for slot in slots for t in slot.tensors.values()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self._pinned = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._pinned else None
        self._places: dict[WeightSlot, int] = {}  # where a slot's bytes begin
        self._size = 0
        for slot in self.slots:
            self._places[slot] = self._size
            self._size += sum(t.nbytes for t in _tensors(slot))
        self._slabs: list[Tensor] = []
        self._asked = 0  # bytes whose copies nobody has waited for
        self._digests: dict[WeightSlot, dict[str, int]] = {}
        self._stale: dict[WeightSlot, None] = {}  # ordered
        self._lock = threading.RLock()  # of what follows, and of the slabs
        self._thread: threading.Thread | None = None

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes."""
        return sum(slab.nbytes for slab in self._slabs)

    def renew(self, slots: Iterable[WeightSlot]) -> None:
        """These have new bytes: begin to copy them."""
        self.settle()
        self._stale.update(dict.fromkeys(slots))
        if self._stale:
            # no daemon: an interpreter that ends waits for it, instead of stopping it within a copy
            self._thread = threading.Thread(target=self._try_copying, name="rollmill-mirror")
            self._thread.start()

    def _try_copying(self) -> None:
        try:
            self._copy_stale()
        except StagingMemoryError as error:  # `complete` tries again, and tells whoever swaps
            log.warning("%s", error)

    def complete(self) -> None:
        """Wait until every slot is mirrored. `StagingMemoryError` if the host has no room."""
        self.settle()
        self._copy_stale()

    def settle(self) -> None:
        """Wait for copies under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy_stale(self) -> None:
        with self._lock:
            if not self._stale:
                return
            self._allocate()
            for slot in self._stale:
                self._copy(slot, back=False)
                self._digests[slot] = dict(slot.digests)
            self._wait()
            self._stale.clear()

    def restore(self, slots: Iterable[WeightSlot]) -> None:
        """Put the mirrored bytes, scales and digests back."""
        with self._lock:
            for slot in slots:
                assert slot not in self._stale
                self._copy(slot, back=True)
                slot.digests = dict(self._digests[slot])
            self._wait()

    def _copy(self, slot: WeightSlot, *, back: bool) -> None:
        start = self._places[slot]
        with torch.cuda.stream(self._stream):  # none: as it is
            for tensor in _tensors(slot):
                raw = tensor.view(-1).view(torch.uint8)
                for part, place in self._parts(raw, start):
                    source, target = (place, part) if back else (part, place)
                    target.copy_(source, non_blocking=self._pinned)
                    self._asked += len(part)
                    if self._asked == PIECE:
                        self._wait()
                start += tensor.nbytes

    def _parts(self, raw: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A tensor, cut where slabs end and what may be asked for at once, and its places in the slabs."""
        done = 0
        while done < len(raw):
            slab, offset = divmod(start + done, SLAB)
            size = min(len(raw) - done, SLAB - offset, PIECE - self._asked)
            yield raw[done : done + size], self._slabs[slab][offset : offset + size]
            done += size

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._asked = 0

    def _allocate(self) -> None:
        try:
            while self.num_bytes < self._size:
                size = min(SLAB, self._size - self.num_bytes)
                self._slabs.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))
        except (RuntimeError, MemoryError) as error:  # torch has no type of its own for this
            held, self._slabs = self.num_bytes, []
            raise StagingMemoryError(
                f"swap='host' keeps a copy of {self._size / 2**30:.2f} GiB in "
                f"{'pinned ' if self._pinned else ''}host memory, which ran out at {held / 2**30:.2f} GiB: free host "
                f"memory, or choose swap='staged' or 'streamed' ({error})"
            ) from error


def _tensors(slot: WeightSlot) -> list[Tensor]:
    return [*slot.tensors.values(), *slot.scales.values()]
