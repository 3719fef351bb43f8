"""`flashinfer_trtllm_routed` and `flashinfer_trtllm`: TensorRT-LLM's grouped kernels through FlashInfer, on Blackwell.

Gate and up, SwiGLU and its quantization, down and the weighted sum are one call. The first takes our router's choices;
the second routes in the kernel and reports what it chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...quant import FP8, NVFP4, Capability, Scheme, layout
from ...quant.flashinfer_api.activation import quantize_nvfp4
from ...quant.flashinfer_api.library import import_flashinfer, takes_pairs
from ...quant.flashinfer_api.tactics import KnownBad, Tactic, TacticGuard, Trial, shared_guard
from ...quant.kernels.activation import fp8_codes
from ..config import MoeConfig
from .flashinfer_trial import make_trial
from .reference import expert_shapes
from .trtllm_experts import TrtllmExperts, padded_size

SMS = (100, 103, 107)
SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")  # of up, gate and down
PER_TENSOR_SCALARS = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
LARGEST_SAFE_FALLBACK = 4096  # 5120 tokens were right, 6144 were not


def _tile_192(tactic: Tactic, tokens: int) -> bool:
    return not tactic.is_fallback and tactic.value[0] == 192


def _large_fallback(tactic: Tactic, tokens: int) -> bool:
    return tactic.is_fallback and tokens > LARGEST_SAFE_FALLBACK


# of NVFP4 with per-token activations
KNOWN_BAD = (
    KnownBad("flashinfer#4486", "tile 192 gives NaN with per-token scales", _tile_192),
    KnownBad("flashinfer#4588, #4854", "the fallback gives NaN with per-token scales and many tokens", _large_fallback),
)


class FlashInferTrtllmRouted:
    """Our router's choices, at float32 weights where this FlashInfer takes them, else packed with BF16 ones.

    The router's BF16 or float32 weights multiply each expert's BF16 output in the last sum.
    """

    name: ClassVar[str] = "flashinfer_trtllm_routed"
    routes: ClassVar[bool] = False
    shows_w2: ClassVar[bool] = False
    capturable: ClassVar[bool] = True

    def __init__(
        self, config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype, linear_kernel: str = "auto"
    ) -> None:
        self.config, self.scheme, self.capability = config, scheme, capability
        self.watch_w2: Callable[[Tensor], None] = lambda x: None
        per_token_nvfp4 = isinstance(scheme, NVFP4) and scheme.activation == "per_token"
        shape = f"{config.num_experts} x [{config.hidden_size}, {config.intermediate_size}] top {config.top_k}"
        self.guard = shared_guard(
            (self.name, config, scheme, capability),
            lambda: TacticGuard(
                f"{self.name} {scheme.name} {scheme.activation} {shape}",
                self.trial,
                KNOWN_BAD if per_token_nvfp4 else (),
            ),
        )
        self.w13, self.w2 = (TrtllmExperts(scheme, shape, self.guard) for shape in expert_shapes(config))
        self.hidden_size, self.intermediate_size = (
            padded_size(config.hidden_size),
            padded_size(config.intermediate_size),
        )

    @classmethod
    def unsupported(cls, config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype) -> str | None:
        if capability.sm not in SMS:
            return f"runs on {', '.join(f'sm{sm}' for sm in SMS)}, this is {capability}"
        if capability.flashinfer is None:
            return "flashinfer is not installed"
        if dtype != torch.bfloat16:
            return f"computes in bfloat16, not {dtype}"
        if config.bias or config.activation != "silu":
            return "computes plain SwiGLU, without biases"
        return cls._scheme_refused(scheme, capability)

    @classmethod
    def _scheme_refused(cls, scheme: Scheme, capability: Capability) -> str | None:
        assert capability.flashinfer is not None
        version = capability.flashinfer.version
        match scheme:
            case NVFP4(activation="static" | "per_token"):
                return None
            case FP8(activation="static", per_channel=False):
                known = capability.flashinfer.fp8_per_tensor_routed or cls.routes
                return None if known else f"flashinfer {version} has static FP8 only with its own router"
            case FP8(activation="per_token"):
                known = capability.flashinfer.fp8_per_channel
                return None if known else f"flashinfer {version} has no FP8 with per-token activations"
        wanted = "NVFP4 and FP8 with static or per-token activations"
        return f"computes {wanted}, not {scheme.name} with {scheme.activation!r}"

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        if not len(x):
            return x
        with self.guard.serving(len(x)):
            return self._run(x, ids, weights, w13, w2)

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        entry = self._entry(routed=True)
        pairs = takes_pairs(entry)
        choices = (ids.int(), weights.float()) if pairs else pack_choices(ids, weights)
        # with choices that are made the method says nothing; this one passes the checks of every version
        arguments = {
            "topk_ids": choices,
            "routing_method_type": import_flashinfer().fused_moe.RoutingMethodType.Renormalize,
        }
        return self._call(entry, x, w13, w2, **arguments, n_group=None, topk_group=None, routed_scaling_factor=None)

    def _call(self, entry: Any, x: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor], **routing: Any) -> Tensor:
        experts, x = self.config.num_experts, layout.pad_to(x, cols=self.hidden_size)
        out = entry(
            routing_bias=routing.pop("routing_bias", None),
            gemm1_weights=w13["weight"],
            gemm2_weights=w2["weight"],
            num_experts=experts,
            top_k=self.config.top_k,
            intermediate_size=self.intermediate_size,
            local_expert_offset=0,
            local_num_experts=experts,
            activation_type=import_flashinfer().fused_moe.ActivationType.Swiglu,
            **self._quantized(x, w13, w2),
            **routing,
        )
        out = out[0] if isinstance(out, list | tuple) else out
        return out[:, : self.config.hidden_size]

    def _entry(self, *, routed: bool) -> Any:
        fused_moe = import_flashinfer().fused_moe
        routed_moe = "routed_moe" if routed else "moe"
        if isinstance(self.scheme, NVFP4):
            return getattr(fused_moe, f"trtllm_fp4_block_scale_{routed_moe}")
        scales = "per_channel" if self.scheme.activation == "per_token" else "per_tensor"
        return getattr(fused_moe, f"trtllm_fp8_{scales}_scale_{routed_moe}")

    def _quantized(self, x: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> dict[str, Any]:
        """Activations and scales. Static: up is scaled by 1 / input_scale of w2 too, since the first product writes
        codes of the second one's input."""
        up_scale = w13["up_scale"]
        if "encode" in w2:
            up_scale = up_scale * w2["encode"]
        elif "input_scale" in w2:
            up_scale = up_scale / w2["input_scale"]
        scalars = up_scale, w13["gate_scale"], w2["out_scale"]
        if isinstance(self.scheme, NVFP4):
            named = dict(zip(SCALARS, scalars, strict=True))
            return named | self._nvfp4_activations(x, w13) | self._nvfp4_weights(w13, w2)
        codes, scale = fp8_codes(x, self.scheme.activation, w13.get("input_scale"))
        arguments = {"hidden_states": codes, "use_routing_scales_on_input": False}
        if self.scheme.activation == "static":
            return arguments | dict(zip(PER_TENSOR_SCALARS, scalars, strict=True))
        arguments |= {"gemm1_per_channel_weight_scale": w13["row_scale"], "hidden_states_scale": scale.view(-1, 1)}
        arguments["gemm2_per_channel_weight_scale"] = w2["row_scale"]
        return arguments | dict(zip(SCALARS, scalars, strict=True))

    def _nvfp4_activations(self, x: Tensor, w13: dict[str, Tensor]) -> dict[str, Any]:
        codes, scales, token_scale = quantize_nvfp4(x, w13.get("encode"), "linear", self.capability)
        arguments = {
            "hidden_states": codes,
            "hidden_states_scale": scales.view(torch.float8_e4m3fn).reshape(len(x), -1),
            "per_token_scale": token_scale,
        }
        assert self.capability.flashinfer is not None
        if self.capability.flashinfer.declares_scale_layout:
            arguments["hidden_states_scale_layout"] = import_flashinfer().SfLayout.layout_linear
        return arguments

    def _nvfp4_weights(self, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> dict[str, Any]:
        unused = ("gemm1_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm2_bias")
        scales = {"gemm1_weights_scale": w13["block_scale"], "gemm2_weights_scale": w2["block_scale"]}
        return scales | dict.fromkeys(unused)

    def run_unguarded(
        self,
        x: Tensor,
        logits: Tensor,
        ids: Tensor,
        weights: Tensor,
        w13: dict[str, Tensor],
        w2: dict[str, Tensor],
    ) -> Tensor:
        """What the self-check runs under tactics of its choice."""
        return self._run(x, ids, weights, w13, w2)

    def trial(self, tokens: int) -> Trial:
        """A random layer and tokens, and the float32 reference of it."""
        return make_trial(self, tokens)


class FlashInferTrtllm(FlashInferTrtllmRouted):
    """Routing in the kernel, whose weights are BF16; it writes down which experts it chose."""

    name: ClassVar[str] = "flashinfer_trtllm"
    routes: ClassVar[bool] = True

    @classmethod
    def unsupported(cls, config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype) -> str | None:
        reason = super().unsupported(config, scheme, capability, dtype)
        if reason is None and isinstance(scheme, FP8) and scheme.activation == "per_token":
            return "with per-token FP8 the kernel does not tell which experts it chose"
        return reason or (None if routing_method(config) else "the kernel has no such router")

    def apply_logits(
        self, x: Tensor, logits: Tensor, bias: Tensor | None, w13: dict[str, Tensor], w2: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x [num_tokens, hidden_size], logits [num_tokens, num_experts], the choice's bias [num_experts] or None ->
        the layer's output, and the chosen experts int16 [num_tokens, top_k]."""
        ids = torch.full((len(x), self.config.top_k), -1, dtype=torch.int16, device=x.device)
        if not len(x):
            return x, ids
        with self.guard.serving(len(x)):
            return self._run_logits(x, logits, bias, w13, w2, ids), ids

    def _run_logits(
        self, x: Tensor, logits: Tensor, bias: Tensor | None, w13: dict[str, Tensor], w2: dict[str, Tensor], ids: Tensor
    ) -> Tensor:
        config, method = self.config, routing_method(self.config)
        assert method is not None
        grouped = method == "DeepSeekV3"
        if grouped and bias is None:
            bias = logits.new_zeros(config.num_experts, dtype=torch.float32)
        return self._call(
            self._entry(routed=False),
            x,
            w13,
            w2,
            routing_logits=logits.float().contiguous(),
            routing_bias=bias,
            n_group=config.n_group if grouped else None,
            topk_group=config.topk_group if grouped else None,
            routed_scaling_factor=config.routed_scaling_factor if grouped else None,
            routing_method_type=import_flashinfer().fused_moe.RoutingMethodType[method],
            routing_replay_out=ids,
        )

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        raise AssertionError("this runner routes by itself: apply_logits")

    def run_unguarded(
        self,
        x: Tensor,
        logits: Tensor,
        ids: Tensor,
        weights: Tensor,
        w13: dict[str, Tensor],
        w2: dict[str, Tensor],
    ) -> Tensor:
        return self._run_logits(x, logits, None, w13, w2, ids.short())


def pack_choices(ids: Tensor, weights: Tensor) -> Tensor:
    """int32 [num_tokens, top_k]: the expert in the high half, the BF16 bits of its weight in the low one."""
    return ids.int() << 16 | weights.bfloat16().view(torch.int16).int() & 0xFFFF


def routing_method(config: MoeConfig) -> str | None:
    """The name of FlashInfer's router that does what `route` does, or None."""
    if config.scoring == "sigmoid":
        return "DeepSeekV3" if config.renormalize else None
    if config.n_group > 1 or config.routed_scaling_factor != 1:
        return None
    return "RenormalizeNaive" if config.renormalize else "Default"
