"""`Parts`: makes layers, and keeps every slot that was made."""

from __future__ import annotations

import torch
from torch import Tensor

from ...moe import RoutedExperts
from ...quant import BF16, Capability, Matmul, Plain, QuantLinear, WeightSlot, plain_slot, select_matmul
from ..kernel_names import KernelNames
from ..schemes import SchemeResolver
from .decoder_config import DecoderConfig


class Parts:
    """Makes layers, and keeps every slot that was made."""

    def __init__(
        self,
        resolver: SchemeResolver,
        capability: Capability,
        dtype: torch.dtype,
        names: KernelNames,
    ) -> None:
        self.resolver, self.capability, self.dtype, self.names = resolver, capability, dtype, names
        self.slots: list[WeightSlot] = []

    def matmul(self, dtype: torch.dtype | None = None) -> Matmul:
        """What multiplies with plain tensors of this dtype (None: the engine's)."""
        return select_matmul(self.capability, dtype or self.dtype, batch_invariant=self.names.batch_invariant)

    def linear(
        self,
        prefix: str,
        shards: dict[str, int],
        in_features: int,
        *,
        bias: bool = False,
        fused: str | None = None,
    ) -> QuantLinear:
        """A linear of the named shards (module below `prefix` -> rows), fused if there are several."""
        modules = [f"{prefix}{shard}" for shard in shards]
        scheme = self.resolver.scheme(modules)
        layer = QuantLinear(
            modules,
            list(shards.values()),
            in_features,
            scheme,
            capability=self.capability,
            dtype=self.dtype,
            kernel=self.names.of_linear(scheme),
            batch_invariant=self.names.batch_invariant,
            bias=bias,
            fused=None if fused is None else prefix + fused,
        )
        self.slots += layer.slots
        return layer

    def plain(
        self,
        module: str,
        *shape: int,
        scheme: Plain = BF16,
        kept: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """An unquantized tensor's served storage; `dtype` where it is not computed in the engine's."""
        rows, *cols = shape
        served = dtype or self.dtype
        slot = plain_slot([module], [rows], cols[0] if cols else None, scheme, self.capability, served, kept=kept)
        self.slots.append(slot)
        return slot.tensors[scheme.tensor]

    def experts(self, config: DecoderConfig, prefix: str) -> RoutedExperts:
        assert config.moe is not None
        projections = config.names.projections
        modules = [f"{prefix}.{e}.{p}" for e in range(config.moe.num_experts) for p in projections]
        layer = RoutedExperts(
            prefix,
            projections,
            config.moe,
            self.resolver.scheme(modules, "experts"),
            capability=self.capability,
            dtype=self.dtype,
            runner=self.names.moe,
            linear_kernel=self.names.linear,
            batch_invariant=self.names.batch_invariant,
            joined=config.names.joined_experts,
        )
        self.slots += layer.slots
        return layer
