"""Memory that runs out while a session stages: an error that says what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from ..quant import WeightSlot
from .errors import StagingMemoryError
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
    return f", and {torch.cuda.mem_get_info(device)[0] / GIB:.2f} GiB are free beside what has been staged"
