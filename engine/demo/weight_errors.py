"""How much of each weight quantization loses, layer by layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...quant import Scheme, WeightShape
from ..report.history import WeightError, WeightKind

# parameters of one layer of a trainer's Mixtral, grouped as the engine fuses them: shards share scales
FUSED: dict[WeightKind, list[str]] = {
    "qkv": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "o": ["self_attn.o_proj.weight"],
    "w13": ["mlp.experts.gate_up_proj"],
    "w2": ["mlp.experts.down_proj"],
}


def weight_errors(weights: Mapping[str, Tensor], num_layers: int, scheme: Scheme) -> list[WeightError]:
    """Error of every quantized weight of a trainer's Mixtral; `weights` are its parameters in BF16."""
    return [
        WeightError(layer, kind, relative_error([weights[f"model.layers.{layer}.{name}"] for name in names], scheme))
        for layer in range(num_layers)
        for kind, names in FUSED.items()
    ]


def relative_error(shards: list[Tensor], scheme: Scheme) -> float:
    """RMS(weight - dequantized) / RMS(weight) of BF16 shards [..., rows, cols] that are stored as one weight."""
    weight = torch.cat(shards, dim=-2)
    units = weight.shape[0] if weight.ndim == 3 else None
    shape = WeightShape(tuple(shard.shape[-2] for shard in shards), weight.shape[-1], units=units)
    difference = scheme.dequantize(scheme.quantize(weight, shape), shape) - weight.float()
    return (difference.norm() / weight.float().norm()).item()
