"""`SideStream`: where sessions compute on a GPU while generation goes on in its own stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """One CUDA stream for all sessions of a policy, so that memory which one frees is the next one's; a CPU has none.

    What is launched `beside` runs after what the caller's stream holds so far, which goes on meanwhile unless it is
    told to `join`. Who hands over or takes back memory says so: `lend` for tensors of another stream, `wait` before
    others read or overwrite what was computed here.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        if self.stream is None or torch.cuda.current_stream(self.stream.device) == self.stream:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """These may be freed by their owner while this stream still reads them: memory is not reused before."""
        if self.stream is not None:
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(self.stream)

    def join(self) -> None:
        """What the caller's stream does next comes after what was launched here."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def wait(self) -> None:
        """Until everything launched here has run."""
        if self.stream is not None:
            self.stream.synchronize()
