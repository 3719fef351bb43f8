"""`LinearKernel`: one way to compute a linear layer; the ordered registry; the choice among them."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .device import Capability
from .errors import UnsupportedError
from .kernels.exact import ExactKernel
from .kernels.plain import PlainKernel
from .kernels.reference import ReferenceKernel
from .kernels.torch_fp8 import TorchFP8Kernel, TorchFP8WeightOnly
from .kernels.triton_nvfp4 import TritonNVFP4Kernel
from .scheme import Plain, Scheme, Stored, TensorSpec, WeightShape


class LinearKernel(Protocol):
    """A kernel bound to one scheme, shape and compute dtype. It holds no weights.

    `prepare` and `derive` are pure: equal bytes when called twice, input untouched. What they return may be the input
    itself, or narrower than `packed` says: placing widens it, exactly. A stack of experts may be prepared a few units
    at a time, but is derived whole.
    """

    name: ClassVar[str]
    shape: WeightShape

    def __init__(self, scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> None: ...

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        """Why this kernel cannot compute such a layer, or None if it can."""
        ...

    def packed(self) -> dict[str, TensorSpec]:
        """Every tensor that `apply` reads."""
        ...

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        """Stored matrices of some units -> packed matrices of these units."""
        ...

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        """Stored float32 scales of the whole weight -> packed scales."""
        ...

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        """x [num_tokens, cols] -> [num_tokens, num_rows], for one unit's packed tensors; bias [num_rows] is added."""
        ...


LINEAR_KERNELS: tuple[type[LinearKernel], ...] = (
    PlainKernel,
    ExactKernel,
    TorchFP8Kernel,
    TritonNVFP4Kernel,
    ReferenceKernel,
)

# What multiplies the packed weights of a kernel with activations as they are, where it does not do so itself.
WEIGHT_ONLY: dict[type[LinearKernel], type[LinearKernel]] = {TorchFP8Kernel: TorchFP8WeightOnly}

# What `auto` walks for quantized layers. float32 is the arithmetic of proofs: `exact` sums in another order than a
# fake-quantized trainer, which flips a rounding tie now and then. On a CPU `_scaled_mm` is some 40 times slower.
PROOF_ORDER = ("reference",)
SPEED_ORDER = {"cpu": ("exact", "reference"), "cuda": ("torch_fp8", "triton_nvfp4", "exact", "reference")}


def select_kernel(
    scheme: Scheme, shape: WeightShape, capability: Capability, dtype: torch.dtype, name: str = "auto"
) -> type[LinearKernel]:
    """The first kernel of the order that can, or the one that was asked for; every reason if none can.

    `name` speaks of quantized layers; unquantized ones have one kernel.
    """
    known = {kernel.name: kernel for kernel in LINEAR_KERNELS}
    if name not in ("auto", *known):
        raise UnsupportedError(f"linear kernel {name!r} is unknown", [f"known: auto, {', '.join(known)}"])
    if isinstance(scheme, Plain):
        return PlainKernel
    automatic = PROOF_ORDER if dtype == torch.float32 else SPEED_ORDER[capability.device.type]
    order = automatic if name == "auto" else (name,)
    reasons = []
    for kernel in (known[candidate] for candidate in order):
        reason = kernel.unsupported(scheme, shape, dtype, capability)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise UnsupportedError(f"no linear kernel for {scheme.name} {list(shape.matrix)} on {capability}", reasons)
