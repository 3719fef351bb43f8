"""The C++ entry points of the fused MoE, as FlashInfer's Python calls them: arguments in order, checks, results.

The order of arguments: `trtllm_fp4_block_scale_moe` and its FP8 siblings in trtllm_fused_moe_kernel_launcher.cu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contracts import UNPACKED, check_channel_scales, check_fp8, check_nvfp4
from .decoding import decode_e2m1, decode_e4m3
from .faults import Faults
from .gemms import require
from .moe import Choices, Scalars, fp8_channel_moe, fp8_moe, nvfp4_moe
from .routing import route, unpack_ids

NEW_FP4 = [
    "routing_input_mode",
    "routing_logits",
    "topk_ids",
    "topk_weights",
    "routing_bias",
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm1_bias",
    "gemm1_lora_delta",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "gemm2_weights",
    "gemm2_weights_scale",
    "gemm2_bias",
    "output1_scale",
    "output1_gate_scale",
    "output2_scale",
    "per_token_scale",
    "num_experts",
    "top_k",
    "num_fused_shared_experts",
    "n_group",
    "topk_group",
    "intermediate_size",
    "local_expert_offset",
    "local_num_experts",
    "routed_scaling_factor",
    "routing_method_type",
    "do_finalize",
    "enable_pdl",
    "activation_type",
    "output",
    "tactic",
    "norm_topk_prob",
    "routing_replay_out",
    "da_routing_metadata",
    "da_body_workspace",
    "is_da_body_preparation",
    "valid_hidden_size",
    "valid_intermediate_size",
]
ABSENT_OLD = {"routing_input_mode", "gemm1_lora_delta", "num_fused_shared_experts", *NEW_FP4[-5:]}
OLD_FP4 = [name for name in NEW_FP4 if name not in ABSENT_OLD]
FP8_TAIL = [
    "num_experts",
    "top_k",
    "n_group",
    "topk_group",
    "intermediate_size",
    "local_expert_offset",
    "local_num_experts",
    "routed_scaling_factor",
    "use_routing_scales_on_input",
    "routing_method_type",
    "do_finalize",
    "enable_pdl",
    "tactic",
    "activation_type",
    "norm_topk_prob",
    "routing_replay_out",
    "da_routing_metadata",
    "da_body_workspace",
    "is_da_body_preparation",
    "gemm1_clamp_limit",
]
FP8_TENSORS = [
    "hidden_states",
    "gemm1_weights",
    "output1_scale",
    "output1_gate_scale",
    "gemm2_weights",
    "output2_scale",
    "output",
]
FP8 = ["routing_logits", "routing_bias", *FP8_TENSORS, *FP8_TAIL]
FP8_ROUTED = ["routing_input_mode", "topk_ids", "topk_weights", "routing_bias", *FP8_TENSORS, *FP8_TAIL]
FP8_CHANNEL = [
    "routing_logits",
    "topk_ids",
    "topk_weights",
    "routing_bias",
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "output1_scale",
    "output1_gate_scale",
    "gemm2_weights",
    "gemm2_weights_scale",
    "output2_scale",
    "output",
] + FP8_TAIL[:15]


def named(names: list[str], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of the C++ function, by name; what this version lacks is None."""
    require(len(arguments) <= len(names), f"{len(arguments)} arguments where {len(names)} are known")
    return {**dict.fromkeys([*NEW_FP4, *FP8_TAIL]), **dict(zip(names, arguments, strict=False))}


class NativeMoe:
    """Stands where `gen_trtllm_gen_fused_moe_sm100_module().build_and_load()` stands."""

    def __init__(self, tactics: list[list[int]], faults: Faults, method_names: dict[int, str]) -> None:
        self.tactics, self.faults, self.method_names = tactics, faults, method_names

    def __getattr__(self, name: str) -> Any:
        """The module's other functions exist, as 0.7.2 collects them all, and are not modelled."""
        if not name.startswith("trtllm_"):
            raise AttributeError(name)

        def refuse(*_: Any) -> None:
            raise NotImplementedError(f"{name} is not in the model")

        return refuse

    def trtllm_get_valid_moe_configs(self, *key: Any) -> list[list[int]]:
        return [list(tactic) for tactic in self.tactics]

    def trtllm_fp4_block_scale_moe(self, *arguments: Any) -> list[Tensor]:
        call = named(OLD_FP4 if len(arguments) == len(OLD_FP4) else NEW_FP4, arguments)
        check_nvfp4(call)
        hidden = call["hidden_states"]
        x = decode_e2m1(hidden) * decode_e4m3(call["hidden_states_scale"].reshape(len(hidden), -1)).repeat_interleave(
            16, 1
        )
        choices = self.choose(call, write_back=True)
        w13 = (call["gemm1_weights"], call["gemm1_weights_scale"])
        w2 = (call["gemm2_weights"], call["gemm2_weights_scale"])
        result = nvfp4_moe(x, call["per_token_scale"], w13, w2, scalars(call), choices)
        return self.finish("flashinfer::trtllm_fp4_block_scale_moe", call, result)

    def trtllm_fp8_per_tensor_scale_moe(self, *arguments: Any) -> list[Tensor]:
        call = named(FP8, arguments)
        return self.fp8("flashinfer::trtllm_fp8_per_tensor_scale_moe", call)

    def trtllm_fp8_per_tensor_scale_routed_moe(self, *arguments: Any) -> list[Tensor]:
        call = named(FP8_ROUTED, arguments)
        return self.fp8("flashinfer::trtllm_fp8_per_tensor_scale_routed_moe", call)

    def fp8(self, op: str, call: dict[str, Any]) -> list[Tensor]:
        check_fp8(call)
        choices = self.choose(call)
        result = fp8_moe(call["hidden_states"], call["gemm1_weights"], call["gemm2_weights"], scalars(call), choices)
        return self.finish(op, call, result)

    def trtllm_fp8_per_channel_scale_moe(self, *arguments: Any) -> list[Tensor]:
        call = named(FP8_CHANNEL, arguments)
        check_fp8(call)
        check_channel_scales(call)
        w13 = (call["gemm1_weights"], call["gemm1_weights_scale"])
        w2 = (call["gemm2_weights"], call["gemm2_weights_scale"])
        x, x_scale = call["hidden_states"], call["hidden_states_scale"]
        result = fp8_channel_moe(x, x_scale, w13, w2, scalars(call), self.choose(call))
        return self.finish("flashinfer::trtllm_fp8_per_channel_scale_moe", call, result)

    def choose(self, call: dict[str, Any], write_back: bool = False) -> Choices:
        """Ids and weights by the call's routing input; in-kernel results go where the kernel writes them."""
        method = self.method_names[int(call["routing_method_type"])]
        require(method != "Unspecified", "routing_method_type Unspecified: the launcher has no such pipeline")
        require(method != "Llama4" or call["top_k"] == 1, "routing_method_type Llama4 takes top_k == 1")
        ids, weights = self.ids_and_weights(call, method)
        require(bool((ids >= 0).all() and (ids < call["num_experts"]).all()), "topk_ids: expert ids out of range")
        if write_back and call["routing_input_mode"] != UNPACKED:
            flat = call["topk_weights"].view(torch.bfloat16).reshape(-1)
            flat[: weights.numel()] = weights.reshape(-1)
        return Choices(ids, weights, call["local_expert_offset"], call["local_num_experts"])

    def ids_and_weights(self, call: dict[str, Any], method: str) -> tuple[Tensor, Tensor]:
        if call["routing_logits"] is None and call["routing_input_mode"] == UNPACKED:
            return call["topk_ids"].long(), call["topk_weights"]
        if call["routing_logits"] is None:
            return unpack_ids(call["topk_ids"])
        scaling = 1.0 if call["routed_scaling_factor"] is None else call["routed_scaling_factor"]
        ids, weights = route(
            call["routing_logits"],
            call["routing_bias"],
            method,
            call["top_k"],
            call["n_group"] or 0,
            call["topk_group"] or 0,
            scaling,
            call["norm_topk_prob"],
        )
        if call["routing_replay_out"] is not None:
            call["routing_replay_out"][: len(ids)] = ids.to(torch.int16)
        return ids, weights

    def finish(self, op: str, call: dict[str, Any], result: Tensor) -> list[Tensor]:
        """Write the leading columns to `output`; faults strike here."""
        tactic = list(call["tactic"])
        require(len(tactic) == 2, f"a tactic is [tile_N, config], not {tactic}")
        fallback = -1 in tactic
        known = [list(t) for t in self.tactics]
        require(fallback or tactic in known, f"invalid MoE tactic {tactic}; this model has {known}")
        output = call["output"]
        output.copy_(result[:, : output.shape[1]])
        self.faults.apply(op, -1 if fallback else tactic, len(result), output)
        return [output]


def scalars(call: dict[str, Any]) -> Scalars:
    return Scalars(call["output1_scale"], call["output1_gate_scale"], call["output2_scale"], call["gemm1_alpha"])
