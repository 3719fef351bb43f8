"""What the machine can do, found once and passed around."""

from __future__ import annotations

import importlib.util

import torch
from msgspec import Struct

from .errors import UnsupportedError
from .flashinfer_api.library import FlashInfer, find_flashinfer

LIBRARIES = ("flashinfer", "triton")


class Capability(Struct, frozen=True):
    """One device: `sm` is 90 for Hopper, 100 for Blackwell, None for a CPU. `flashinfer` is looked at for GPUs only."""

    device: torch.device
    sm: int | None
    libraries: tuple[str, ...]
    flashinfer: FlashInfer | None = None
    no_flashinfer: str = "flashinfer is not installed"  # why there is none

    def __str__(self) -> str:
        return "cpu" if self.sm is None else f"sm{self.sm}"


def find_capability(device: str = "auto") -> Capability:
    """`auto` takes the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {device!r}", ["known: auto, cpu, cuda, cuda:N"])
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device {device!r} was asked for, but torch sees no GPU", ["use device='cpu'"])
    return describe_device(torch.device(device), _sm(torch.device(device)))


def describe_device(device: torch.device, sm: int | None) -> Capability:
    """A device of this compute capability with the libraries that are installed here, whether it is here or not."""
    libraries = tuple(name for name in LIBRARIES if importlib.util.find_spec(name))
    found, reason = (None, "FlashInfer runs on GPUs") if sm is None else find_flashinfer()
    return Capability(device, sm, libraries, found, reason)


def _sm(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
