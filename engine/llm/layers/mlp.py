"""The gated MLP."""

from __future__ import annotations

from torch import Tensor

from ....moe import gated_activation
from ..decoder_config import DecoderConfig
from ..parts import Parts
from .fused import has_fused_kernels


class MLP:
    """down(act(gate(x)) * up(x)); gate and up are one fused linear. `prefix` ends in a dot."""

    def __init__(self, parts: Parts, config: DecoderConfig, prefix: str, intermediate_size: int) -> None:
        shards = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = parts.linear(prefix, shards, config.hidden_size, bias=config.mlp_bias, fused="gate_up_proj")
        out = {"down_proj": config.hidden_size}
        self.down = parts.linear(prefix, out, intermediate_size, bias=config.mlp_bias)
        self.activate = gated_activation(config.activation)
        self.fusible = config.activation == "silu"  # what `gpu/silu.py` computes

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if self.fusible and has_fused_kernels(gate_up):
            from ..gpu.silu import silu_and_mul

            return self.down(silu_and_mul(gate_up))
        return self.down(self.activate(gate_up))
