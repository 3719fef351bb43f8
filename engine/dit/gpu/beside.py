"""`Beside`: a second stream, for work that fills what the first one leaves idle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """On a CPU everything happens in its turn.

    Who forks keeps all tensors that the work reads or writes until the current stream has waited for the last mark:
    their memory would be given to others, which know of the current stream only.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Work within waits for what the current stream has been given so far, and for nothing later."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.Event | None:
        """The work so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.Event | None) -> None:
        """Let the current stream wait for the work before `mark`."""
        if mark is not None:
            mark.wait()
