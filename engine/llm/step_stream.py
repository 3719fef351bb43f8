"""`StepStream`: the CUDA stream in which all steps of one engine run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class StepStream:
    """A stream of their own keeps steps out of the caller's way: what a trainer in the same process queues on its
    stream, and the swaps that follow it, waits for no step, and no step waits for it. A CPU has none.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.follow()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is launched inside runs here."""
        with torch.cuda.stream(self.stream):  # none: as it is
            yield

    def follow(self) -> None:
        """Steps to come run after what the caller's stream holds so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def hand_over(self, tensor: Tensor) -> None:
        """To the caller's stream: its memory is not used again here while it is read there."""
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def wait(self) -> None:
        """Until everything launched here has run."""
        if self.stream is not None:
            self.stream.synchronize()
