"""`SiblingLinears`: linears that are quantized together and applied one by one (to_q, to_k, to_v of an attention)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msgspec.structs import replace
from torch import Tensor

from .device import Capability
from .kernel import WEIGHT_ONLY, LinearKernel, select_kernel
from .kernels.plain import PlainKernel
from .kernels.torch_fp8 import TILE, TorchFP8Kernel
from .scheme import FP8, Plain, Scheme, Stored, TensorSpec, WeightShape
from .slot import WeightSlot


class SplitPacker:
    """Shards of one weight, packed by a kernel each; tensor `key` of shard `i` is called `i.key`."""

    def __init__(self, scheme: Scheme, shape: WeightShape, kernels: Sequence[LinearKernel]) -> None:
        self.shape, self.kernels = shape, tuple(kernels)
        self._per_row = isinstance(scheme, FP8) and scheme.per_channel

    def packed(self) -> dict[str, TensorSpec]:
        return {f"{i}.{key}": spec for i, kernel in enumerate(self.kernels) for key, spec in kernel.packed().items()}

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        packed = {}
        for i, kernel in enumerate(self.kernels):
            rows = self.shape.shard_slice(i)
            shard = kernel.prepare({key: value[rows] for key, value in matrices.items()})
            packed |= {f"{i}.{key}": value for key, value in shard.items()}
        return packed

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        packed = {}
        for i, kernel in enumerate(self.kernels):
            shard = kernel.derive({key: value[self._scale_slice(key, i)] for key, value in scales.items()})
            packed |= {f"{i}.{key}": value for key, value in shard.items()}
        return packed

    def _scale_slice(self, key: str, shard: int) -> slice:
        whole_rows = self._per_row and key == "weight_scale"
        return self.shape.shard_slice(shard) if whole_rows else slice(shard, shard + 1)


class SiblingLinears:
    """y_i = x W_i^T (+ bias): one slot over the named modules, a kernel for each of them.

    They share what the scheme shares between shards (NVFP4's global scale), as ModelOpt lets linears do that read the
    same input; each is computed when it is asked for. `joined`: one product of them all, where their rows lie in one
    packed weight, else None; `no_weight_only`: why `apply_weight_only` is not to be had, or None.
    """

    def __init__(
        self,
        name: str,
        modules: Sequence[str],
        rows: Sequence[int],
        in_features: int,
        scheme: Scheme,
        *,
        capability: Capability,
        dtype: torch.dtype,
        kernel: str = "auto",
        fused: Sequence[str] = (),
    ) -> None:
        self.scheme, self.capability, self.dtype = scheme, capability, dtype
        shapes = [WeightShape((count,), in_features) for count in rows]
        self.kernels = [
            select_kernel(scheme, shape, capability, dtype, kernel)(scheme, shape, dtype, capability)
            for shape in shapes
        ]
        shape = WeightShape(tuple(rows), in_features)
        self.joined = self._join(shape)
        packer = self.joined or SplitPacker(scheme, shape, self.kernels)
        self.slot = WeightSlot(name, [modules], scheme, shape, packer, device=capability.device, fused=fused)
        self._packed = [self._of_shard(i) for i in range(len(rows))]
        self._weight_only, self.no_weight_only = self._make_weight_only()

    def apply(self, shard: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, rows of the shard], in `dtype`."""
        if shard == 0:
            self.slot.watch(x)  # all shards read the same input
        return self.kernels[shard].apply(x, self._packed[shard], bias)

    def apply_weight_only(self, shard: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same packed weights, the activations as they are. Only where `no_weight_only` is None."""
        return self._weight_only[shard].apply(x, self._packed[shard], bias)

    def _join(self, shape: WeightShape) -> PlainKernel | TorchFP8Kernel | None:
        """The kernel for all shards on top of each other, where a shard's packed tensors are rows of its own.

        On a CPU one product pays nothing, and static scales may be each shard's own.
        """
        kind, *others = {type(kernel) for kernel in self.kernels}
        if self.capability.sm is None or len(shape.rows) == 1 or others:
            return None
        fits = self.scheme.activation != "static" and not any(rows % TILE for rows in shape.rows)
        if kind is PlainKernel or (issubclass(kind, TorchFP8Kernel) and fits):
            return kind(self.scheme, shape, self.dtype, self.capability)
        return None

    def _of_shard(self, shard: int) -> dict[str, Tensor]:
        """What a shard's kernel reads."""
        if self.joined is not None:
            return self.joined.rows_of(self.slot.tensors, self.slot.shape.shard_slice(shard))
        start = f"{shard}."
        return {key.removeprefix(start): t for key, t in self.slot.tensors.items() if key.startswith(start)}

    def packed(self, shard: int) -> dict[str, Tensor]:
        """What a shard's kernel reads: the slot's tensors, or views of them."""
        return self._packed[shard]

    def _make_weight_only(self) -> tuple[list[LinearKernel], str | None]:
        """The kernels that read what is packed and leave activations alone; or none, and why."""
        scheme = self.scheme
        if isinstance(scheme, Plain) or scheme.activation == "none":
            return self.kernels, None
        scheme = replace(scheme, activation="none")  # pyright: ignore[reportArgumentType]
        made: list[LinearKernel] = []
        for kernel in self.kernels:
            kind = WEIGHT_ONLY.get(type(kernel), type(kernel))
            reason = kind.unsupported(scheme, kernel.shape, self.dtype, self.capability)
            if reason is None:
                made.append(kind(scheme, kernel.shape, self.dtype, self.capability))
                if not made[-1].packed().items() <= kernel.packed().items():
                    reason = "packs weights otherwise when activations are not quantized"
            if reason is not None:
                return [], f"{self.slot.name}: {kernel.name}: {reason}"
        return made, None
