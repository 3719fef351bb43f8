"""What the launchers of the fused MoE ask of their arguments.

Checks from trtllm_fused_moe_kernel_launcher.cu; stricter than it where the launchers read a pointer without asking:
contiguity, exact shapes, ids within range. Not modelled, hence NotImplementedError: `do_finalize=False`, LoRA, biases,
fused shared experts, routing scales on the input, valid sizes, activations other than SwiGLU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .decoding import num_scale_bytes
from .gemms import require

SHUFFLE_ROWS = 128  # epilogue tile
K_MULTIPLE = 64  # four block scales: "outputDim % (4 * sfBlockSize) == 0" in trtllm_fused_moe_runner.cu
UNPACKED = 2  # RoutingInputMode.UnpackedPrecomputed
NOT_MODELLED = [
    "gemm1_bias",
    "gemm2_bias",
    "gemm1_lora_delta",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "valid_hidden_size",
    "valid_intermediate_size",
]


def check_common(call: dict[str, Any], hidden_size: int) -> None:
    """What every launcher asks: routing, sizes, per-expert scalars, output."""
    tokens, experts, local = len(call["hidden_states"]), call["num_experts"], call["local_num_experts"]
    require(tokens > 0, "no tokens: the launcher divides by the number of scales")
    require(0 < call["top_k"] <= experts, "top_k must be between 1 and num_experts")
    require(0 < local <= experts, "local_num_experts must be between 1 and num_experts")
    require(0 <= call["local_expert_offset"] <= experts - local, "local_expert_offset is out of range")
    for name in NOT_MODELLED:
        if call[name] is not None:
            raise NotImplementedError(f"{name} is not in the model")
    if not call["do_finalize"] or call["use_routing_scales_on_input"] or call["num_fused_shared_experts"]:
        raise NotImplementedError("the model finalizes, without routing scales on the input and fused shared experts")
    if int(call["activation_type"]) != 3:
        raise NotImplementedError("the model has SwiGLU (ActivationType.Swiglu) only")
    check_routing(call, tokens, experts)
    for name in ("output1_scale", "output1_gate_scale", "output2_scale", "gemm1_alpha"):
        check_tensor(call, name, torch.float32, (local,), optional=name == "gemm1_alpha")
    output = call["output"]
    require(output.dtype == torch.bfloat16 and output.is_contiguous(), "output must be contiguous bfloat16")
    require(output.ndim == 2 and len(output) == tokens and output.shape[1] <= hidden_size, "output has a wrong shape")
    intermediate = call["intermediate_size"]
    require((2 * intermediate) % SHUFFLE_ROWS == 0, f"2 * intermediate_size must be a multiple of {SHUFFLE_ROWS}")
    require(hidden_size % SHUFFLE_ROWS == 0, f"hidden_size must be a multiple of {SHUFFLE_ROWS}, not {hidden_size}")
    require(intermediate % K_MULTIPLE == 0, f"intermediate_size must be a multiple of {K_MULTIPLE}")


def check_routing(call: dict[str, Any], tokens: int, experts: int) -> None:
    shape = (tokens, call["top_k"])
    if call["routing_logits"] is None:
        check_tensor(call, "topk_ids", torch.int32, shape)
        if call["routing_input_mode"] == UNPACKED:
            weights = call["topk_weights"]
            require(weights.dtype in (torch.bfloat16, torch.float32), "topk_weights must be bfloat16 or float32")
            check_tensor(call, "topk_weights", weights.dtype, shape)
    else:
        logits = call["routing_logits"]
        require(logits.dtype in (torch.float32, torch.bfloat16), "routing_logits must be float32 or bfloat16")
        check_tensor(call, "routing_logits", logits.dtype, (tokens, experts))
    bias, replay = call["routing_bias"], call["routing_replay_out"]
    if bias is not None:
        require(bias.dtype in (torch.float32, torch.bfloat16), "routing_bias must be float32 or bfloat16")
        check_tensor(call, "routing_bias", bias.dtype, (experts,))
    if replay is not None:
        require(len(replay) >= tokens, f"routing_replay_out has {len(replay)} rows for {tokens} tokens")
        check_tensor(call, "routing_replay_out", torch.int16, (len(replay), call["top_k"]))


def check_tensor(
    call: dict[str, Any], name: str, dtype: torch.dtype, shape: tuple[int, ...], optional: bool = False
) -> None:
    tensor = call[name]
    if tensor is None and optional:
        return
    require(isinstance(tensor, Tensor), f"{name} must be a tensor, not {type(tensor).__name__}")
    require(tensor.dtype == dtype, f"{name} must be {dtype}, not {tensor.dtype}")
    require(tuple(tensor.shape) == shape, f"{name} must be {list(shape)}, not {list(tensor.shape)}")
    require(tensor.is_contiguous(), f"{name} must be contiguous")


def check_nvfp4(call: dict[str, Any]) -> None:
    hidden = call["hidden_states"]
    require(hidden.dtype == torch.uint8 and hidden.ndim == 2, "hidden_states must be uint8 [T, hidden_size / 2]")
    tokens, hidden_size = len(hidden), 2 * hidden.shape[1]
    experts, intermediate = call["local_num_experts"], call["intermediate_size"]
    check_tensor(call, "hidden_states", torch.uint8, (tokens, hidden_size // 2))
    check_common(call, hidden_size)
    scale = call["hidden_states_scale"]
    require(scale is not None, "hidden_states_scale is required")
    require(scale.dtype == torch.float8_e4m3fn, f"hidden_states_scale must be float8_e4m3fn, not {scale.dtype}")
    require(scale.numel() == tokens * hidden_size // 16, "hidden_states_scale must be linear, T * hidden_size / 16")
    require(scale.is_contiguous(), "hidden_states_scale must be contiguous")
    check_tensor(call, "gemm1_weights", torch.uint8, (experts, 2 * intermediate, hidden_size // 2))
    check_tensor(call, "gemm2_weights", torch.uint8, (experts, hidden_size, intermediate // 2))
    check_tensor(call, "per_token_scale", torch.float32, (tokens,), optional=True)
    for name, rows, k in (("gemm1", 2 * intermediate, hidden_size), ("gemm2", hidden_size, intermediate)):
        block = call[f"{name}_weights_scale"]
        size = experts * num_scale_bytes(rows, k // 16, "128x4")
        require(block.dtype == torch.float8_e4m3fn, f"{name}_weights_scale must be float8_e4m3fn, not {block.dtype}")
        require(
            len(block) == experts and block.numel() == size, f"{name}_weights_scale must hold {size} bytes by expert"
        )
        require(block.is_contiguous(), f"{name}_weights_scale must be contiguous")


def check_fp8(call: dict[str, Any]) -> None:
    hidden = call["hidden_states"]
    require(hidden.dtype == torch.float8_e4m3fn and hidden.ndim == 2, "hidden_states must be float8_e4m3fn [T, hidden]")
    tokens, hidden_size = hidden.shape
    experts, intermediate = call["local_num_experts"], call["intermediate_size"]
    check_tensor(call, "hidden_states", torch.float8_e4m3fn, (tokens, hidden_size))
    check_common(call, hidden_size)
    check_tensor(call, "gemm1_weights", torch.float8_e4m3fn, (experts, 2 * intermediate, hidden_size))
    check_tensor(call, "gemm2_weights", torch.float8_e4m3fn, (experts, hidden_size, intermediate))


def check_channel_scales(call: dict[str, Any]) -> None:
    tokens, hidden_size = call["hidden_states"].shape
    experts, intermediate = call["local_num_experts"], call["intermediate_size"]
    check_tensor(call, "hidden_states_scale", torch.float32, (tokens, 1))
    check_tensor(call, "gemm1_weights_scale", torch.float32, (experts, 2 * intermediate))
    check_tensor(call, "gemm2_weights_scale", torch.float32, (experts, hidden_size))
