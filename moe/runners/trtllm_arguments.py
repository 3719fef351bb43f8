"""What TensorRT-LLM's grouped kernels are given: activations, weights and scales under FlashInfer's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...quant import NVFP4, Capability, Scheme
from ...quant.flashinfer_api.activation import quantize_nvfp4
from ...quant.flashinfer_api.library import import_flashinfer
from ...quant.kernels.activation import fp8_codes

Packed = dict[str, Tensor]

SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")  # of up, gate and down
PER_TENSOR_SCALARS = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
UNUSED = ("gemm1_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm2_bias")


def make_arguments(x: Tensor, scheme: Scheme, capability: Capability, w13: Packed, w2: Packed) -> dict[str, Any]:
    """x BF16 [num_tokens, padded hidden_size] and both stacks -> keyword arguments."""
    arguments = {"gemm1_weights": w13["weight"], "gemm2_weights": w2["weight"]}
    if isinstance(scheme, NVFP4):
        return arguments | _nvfp4(x, capability, w13, w2)
    return arguments | (_fp8_static(x, w13, w2) if scheme.activation == "static" else _fp8_per_token(x, w13, w2))


def _nvfp4(x: Tensor, capability: Capability, w13: Packed, w2: Packed) -> dict[str, Any]:
    codes, scales, token_scale = quantize_nvfp4(x, w13.get("encode"), "linear", capability)
    arguments: dict[str, Any] = {
        "hidden_states": codes,
        "hidden_states_scale": scales.view(torch.float8_e4m3fn).reshape(len(x), -1),
        "per_token_scale": token_scale,
        "gemm1_weights_scale": w13["block_scale"],
        "gemm2_weights_scale": w2["block_scale"],
    }
    assert capability.flashinfer is not None
    if capability.flashinfer.declares_scale_layout:
        arguments["hidden_states_scale_layout"] = import_flashinfer().SfLayout.layout_linear
    # static: the first product writes codes of the second one's input, so up is scaled to them
    up_scale = w13["up_scale"] if token_scale is not None else w13["up_scale"] * w2["encode"]
    return arguments | _scalars(SCALARS, up_scale, w13, w2) | dict.fromkeys(UNUSED)


def _fp8_static(x: Tensor, w13: Packed, w2: Packed) -> dict[str, Any]:
    codes, _ = fp8_codes(x, "static", w13["input_scale"])
    arguments = {"hidden_states": codes, "use_routing_scales_on_input": False}
    return arguments | _scalars(PER_TENSOR_SCALARS, w13["up_scale"] / w2["input_scale"], w13, w2)


def _fp8_per_token(x: Tensor, w13: Packed, w2: Packed) -> dict[str, Any]:
    codes, scale = fp8_codes(x, "per_token", None)
    arguments = {
        "hidden_states": codes,
        "hidden_states_scale": scale.view(-1, 1),
        "gemm1_per_channel_weight_scale": w13["row_scale"],
        "gemm2_per_channel_weight_scale": w2["row_scale"],
        "use_routing_scales_on_input": False,
    }
    return arguments | _scalars(SCALARS, w13["up_scale"], w13, w2)


def _scalars(names: tuple[str, ...], up_scale: Tensor, w13: Packed, w2: Packed) -> dict[str, Any]:
    return dict(zip(names, (up_scale, w13["gate_scale"], w2["out_scale"]), strict=True))
