"""Memory for swaps: a warning where there will be too little, an error that says what would fit where it ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from ..quant import WeightSlot
from .errors import StagingMemoryError
from .pending import STAGED_BACKLOG
from .served import ServedWeights

GIB = 2**30


@contextmanager
def naming_memory_errors(what: Callable[[], str], served: ServedWeights, mode: str) -> Iterator[None]:
    """`StagingMemoryError` instead of what torch raises when memory runs out."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _staging_error(what(), served.plan.slots, mode, error) from error
    except RuntimeError as error:  # torch's CPU allocator has no type of its own
        if "allocate memory" not in str(error):
            raise
        raise _staging_error(what(), served.plan.slots, mode, error) from error


def staging_shortage(slots: Iterable[WeightSlot], mode: str) -> str | None:
    """What to say if a GPU has no room for a second packed copy, as it is now; None if it has, or needs none."""
    slots = tuple(slots)
    needed = staging_bytes(slots, mode)
    if not needed:
        return None
    free = free_bytes(next(t.device for slot in slots for t in slot.tensors.values() if t.is_cuda))
    if needed <= free:
        return None
    return (
        f"swap='staged' needs {needed / GIB:.1f} GiB beside what is held now, {free / GIB:.1f} GiB are free: unless "
        "memory is given back, swaps will be refused; a smaller KV cache, swap='host' or 'streamed' would fit"
    )


def staging_bytes(slots: Iterable[WeightSlot], mode: str) -> int:
    """What a swap of all these takes on a GPU beside them: a second packed copy and units that wait, or nothing."""
    packed = sum(t.nbytes for slot in slots for t in slot.tensors.values() if t.is_cuda)
    return packed + STAGED_BACKLOG if mode == "staged" and packed else 0


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a GPU, with what torch holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _staging_error(what: str, slots: Iterable[WeightSlot], mode: str, error: BaseException) -> StagingMemoryError:
    tensors = [t for slot in slots for t in slot.tensors.values()]
    packed = sum(t.nbytes for t in tensors) / GIB
    lines = [f"memory ran out while staging {what}: {error}"]
    if mode == "staged":
        lines.append(
            f"swap='staged' holds the packed weights twice, {packed:.2f} GiB more{_free_on(tensors[0].device)}; what "
            "fits: swap='host' (the copy in host memory, generation paused meanwhile), swap='streamed' (no copy), "
            "smaller buckets, or a smaller KV cache"
        )
    else:
        lines.append("what fits: smaller buckets, or a smaller KV cache")
    return StagingMemoryError("; ".join(lines))


def _free_on(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f", and {free_bytes(device) / GIB:.2f} GiB are free beside what has been staged"
