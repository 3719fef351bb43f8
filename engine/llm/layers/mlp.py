"""The gated MLP."""

from __future__ import annotations

from torch import Tensor

from ....moe import gated_activation
from ....quant import FP8Rows, Reads
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

    @property
    def reads(self) -> Reads:
        return "codes" if self.gate_up.takes_codes else "values"

    def __call__(self, x: Tensor | FP8Rows) -> Tensor:
        gate_up = self.gate_up(x)
        if not (self.fusible and has_fused_kernels(gate_up)):
            return self.down(self.activate(gate_up))
        from ..gpu.silu import silu_and_mul, silu_and_mul_quantize_fp8

        if self.down.takes_codes:
            return self.down(FP8Rows(*silu_and_mul_quantize_fp8(gate_up)))
        return self.down(silu_and_mul(gate_up))
