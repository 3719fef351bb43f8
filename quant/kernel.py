"""`LinearKernel`: one way to compute a linear layer; the ordered registry; the choice among them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from .device import Capability
from .errors import UnsupportedError
from .fp8_rows import FP8Rows
from .kernels.exact import ExactKernel
from .kernels.flashinfer_fp4 import FP4_BACKENDS
from .kernels.flashinfer_fp8 import FlashInferFP8
from .kernels.plain import PlainKernel
from .kernels.reference import ReferenceKernel
from .kernels.torch_fp8 import TorchFP8Kernel, TorchFP8WeightOnly
from .kernels.triton_bf16 import TritonBF16Kernel
from .kernels.triton_fp8 import TritonFP8Kernel
from .kernels.triton_nvfp4 import TritonNVFP4InvariantKernel, TritonNVFP4Kernel
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

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        """Why a row's bits may depend on how many rows there are, or None if they do not."""
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


@runtime_checkable
class CodesKernel(Protocol):
    """A linear kernel that can be given FP8 codes in place of BF16."""

    @property
    def takes_codes(self) -> bool:
        """Whether `multiply` computes this layer: its activations are quantized per token."""
        ...

    def multiply(self, rows: FP8Rows, packed: Stored, bias: Tensor | None = None) -> Tensor:
        """What `apply` computes, from codes on."""
        ...


LINEAR_KERNELS: tuple[type[LinearKernel], ...] = (
    PlainKernel,
    TritonBF16Kernel,
    *FP4_BACKENDS.values(),
    TritonFP8Kernel,
    TorchFP8Kernel,
    FlashInferFP8,
    TritonNVFP4Kernel,
    TritonNVFP4InvariantKernel,
    ExactKernel,
    ReferenceKernel,
)

# What multiplies the packed weights of a kernel with activations as they are, where it does not do so itself.
WEIGHT_ONLY: dict[type[LinearKernel], type[LinearKernel]] = {
    TorchFP8Kernel: TorchFP8WeightOnly,
    TritonFP8Kernel: TorchFP8WeightOnly,
}

# What `auto` walks for quantized layers. float32 is the arithmetic of proofs: `exact` sums in another order than a
# fake-quantized trainer, which flips a rounding tie now and then. On a CPU `_scaled_mm` is some 40 times slower.
PROOF_ORDER = ("reference",)
CPU_ORDER = ("exact", "reference")
GPU_ORDER = ("triton_fp8", "torch_fp8", "triton_nvfp4", "exact", "reference")
INVARIANT = ("triton_nvfp4_invariant",)  # behind these, where a row may not depend on the others
BLACKWELL = ("flashinfer_trtllm", "flashinfer_cute_dsl")
IN_ORDER = ("flashinfer_auto",)
NVFP4_ORDER = {100: BLACKWELL, 103: BLACKWELL, 107: BLACKWELL, 110: IN_ORDER, 120: IN_ORDER, 121: IN_ORDER}

log = logging.getLogger("rollmill")


def automatic_order(dtype: torch.dtype, capability: Capability, *, batch_invariant: bool = False) -> tuple[str, ...]:
    """The kernels that `auto` tries, in their order."""
    if dtype == torch.float32:
        return PROOF_ORDER
    if capability.sm is None:
        return CPU_ORDER
    return NVFP4_ORDER.get(capability.sm, ()) + GPU_ORDER + (INVARIANT if batch_invariant else ())


def select_kernel(
    scheme: Scheme,
    shape: WeightShape,
    capability: Capability,
    dtype: torch.dtype,
    name: str = "auto",
    *,
    batch_invariant: bool = False,
) -> type[LinearKernel]:
    """The first kernel of the order that can, or the one that was asked for; every reason if none can.

    `name` speaks of quantized layers; unquantized ones have one kernel, and another with `batch_invariant`: then only
    kernels can that give a row the same bits with any number of others. What was taken, and why nothing before it, is
    logged once.
    """
    known = {kernel.name: kernel for kernel in LINEAR_KERNELS}
    if name not in ("auto", *known):
        raise UnsupportedError(f"linear kernel {name!r} is unknown", [f"known: auto, {', '.join(known)}"])
    if isinstance(scheme, Plain):
        if not batch_invariant:
            return PlainKernel
        order = ("bf16", "triton_bf16")
    else:
        order = (name,) if name != "auto" else automatic_order(dtype, capability, batch_invariant=batch_invariant)
    passed_over = []
    for kernel, reason in judge_kernels(scheme, shape, capability, dtype, order, batch_invariant=batch_invariant):
        if reason is None:
            log_choice(f"{scheme.name}, activations {scheme.activation}", kernel.name, str(capability), *passed_over)
            return kernel
        passed_over.append(f"{kernel.name}: {reason}")
    kind = "batch-invariant linear kernel" if batch_invariant else "linear kernel"
    raise UnsupportedError(f"no {kind} for {scheme.name} {list(shape.matrix)} on {capability}", passed_over)


def judge_kernels(
    scheme: Scheme,
    shape: WeightShape,
    capability: Capability,
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
    *,
    batch_invariant: bool = False,
) -> list[tuple[type[LinearKernel], str | None]]:
    """(kernel, why it cannot or None) for the named kernels, or for all."""
    known = {kernel.name: kernel for kernel in LINEAR_KERNELS}
    kernels = [known[name] for name in (known if names is None else names)]
    reasons = [kernel.unsupported(scheme, shape, dtype, capability) for kernel in kernels]
    if batch_invariant:
        reasons = [
            reason or shares_a_scale(scheme) or kernel.batch_dependent(capability)
            for kernel, reason in zip(kernels, reasons, strict=True)
        ]
    return list(zip(kernels, reasons, strict=True))


def shares_a_scale(scheme: Scheme) -> str | None:
    """Why no kernel can give rows of this scheme bits of their own, or None."""
    return "activations per tensor have one scale for all rows" if scheme.activation == "per_tensor" else None


@cache
def log_choice(what: str, taken: str, capability: str, *passed_over: str) -> None:
    """Say once what serves, and why not what comes before it."""
    log.info("%s on %s: %s%s", what, capability, taken, "".join(f"; not {reason}" for reason in passed_over))
