"""`Parts`: makes layers, and keeps every slot that was made."""

from __future__ import annotations

import torch
from torch import Tensor

from ...moe import RoutedExperts
from ...quant import BF16, Capability, Plain, QuantLinear, WeightSlot, plain_slot
from ..schemes import SchemeResolver
from .decoder_config import DecoderConfig


class Parts:
    """Makes layers, and keeps every slot that was made."""

    def __init__(
        self,
        resolver: SchemeResolver,
        capability: Capability,
        dtype: torch.dtype,
        linear_kernel: str,
        moe_runner: str,
    ) -> None:
        self.resolver, self.capability, self.dtype = resolver, capability, dtype
        self.linear_kernel, self.moe_runner = linear_kernel, moe_runner
        self.slots: list[WeightSlot] = []

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
        layer = QuantLinear(
            modules,
            list(shards.values()),
            in_features,
            self.resolver.scheme(modules),
            capability=self.capability,
            dtype=self.dtype,
            kernel=self.linear_kernel,
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
            runner=self.moe_runner,
            linear_kernel=self.linear_kernel,
            joined=config.names.joined_experts,
        )
        self.slots += layer.slots
        return layer
