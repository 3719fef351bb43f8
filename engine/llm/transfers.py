"""Small values between host and device, without waiting for what the device is at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """A tensor of Python values on `device`; on a GPU they come in the stream's order, out of pinned memory."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class Download:
    """A copy to the host that is under way; `read` waits for it, and for nothing that was launched later."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._done = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """The values on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._values
