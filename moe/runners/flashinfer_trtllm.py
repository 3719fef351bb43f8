"""`flashinfer_trtllm_routed` and `flashinfer_trtllm`: TensorRT-LLM's grouped kernels through FlashInfer, on Blackwell.

Gate and up, SwiGLU and its quantization, down and the weighted sum are one call. The first takes our router's choices;
the second routes in the kernel and reports what it chose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...quant import FP8, NVFP4, Capability, Scheme, layout
from ...quant.flashinfer_api.guard import Bench, KnownBad, TacticGuard, shared_guard
from ...quant.flashinfer_api.library import import_flashinfer, takes_pairs
from ...quant.flashinfer_api.tactics import Tactic
from ..config import MoeConfig
from ..routing import route
from .flashinfer_trial import make_bench
from .reference import expert_shapes
from .trtllm_arguments import Packed, make_arguments
from .trtllm_experts import TrtllmExperts, padded_size

SMS = (100, 103, 107)
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


class TrtllmRunner:
    """What both have in common."""

    name: ClassVar[str]
    routes: ClassVar[bool]
    shows_w2: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    leaves_sum: ClassVar[bool] = False
    takes_codes = False

    def __init__(
        self, config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype, linear_kernel: str = "auto"
    ) -> None:
        self.config, self.scheme, self.capability = config, scheme, capability
        self.watch_w2: Callable[[Tensor], None] = lambda x: None
        self.guard = self._shared_guard(partial(type(self)._make_bench, config, scheme, capability, dtype))
        self.w13, self.w2 = (TrtllmExperts(scheme, shape, self.guard) for shape in expert_shapes(config))
        self.hidden_size = padded_size(config.hidden_size)

    def _shared_guard(self, bench: Callable[[], Bench]) -> TacticGuard:
        config, scheme = self.config, self.scheme
        shape = f"{config.num_experts} x [{config.hidden_size}, {config.intermediate_size}] top {config.top_k}"
        per_token_nvfp4 = isinstance(scheme, NVFP4) and scheme.activation == "per_token"
        product = f"{self.name} {scheme.name} {scheme.activation} {shape}"
        known_bad = KNOWN_BAD if per_token_nvfp4 else ()
        key = (self.name, config, scheme, self.capability)
        return shared_guard(key, lambda: TacticGuard(product, bench, known_bad))

    @classmethod
    def _make_bench(cls, config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype) -> Bench:
        return make_bench(cls(config, scheme, capability, dtype))

    @classmethod
    def unsupported(cls, config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype) -> str | None:
        if capability.sm not in SMS:
            return f"runs on {', '.join(f'sm{sm}' for sm in SMS)}, this is {capability}"
        if capability.flashinfer is None:
            return capability.no_flashinfer
        if dtype != torch.bfloat16:
            return f"computes in bfloat16, not {dtype}"
        if config.bias or config.activation != "silu":
            return "computes plain SwiGLU, without biases"
        return cls._scheme_refused(scheme, capability)

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return "FlashInfer chooses a tactic by the number of tokens"

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

    def run_random(self, x: Tensor, logits: Tensor, w13: Packed, w2: Packed) -> Tensor:
        """A layer with its router, under whatever tactic the self-check has forced."""
        raise NotImplementedError

    def _call(self, x: Tensor, w13: Packed, w2: Packed, **routing: Any) -> Tensor:
        experts = self.config.num_experts
        arguments = {"routing_bias": None, "n_group": None, "topk_group": None, "routed_scaling_factor": None} | routing
        out = self._entry()(
            num_experts=experts,
            top_k=self.config.top_k,
            intermediate_size=padded_size(self.config.intermediate_size),
            local_expert_offset=0,
            local_num_experts=experts,
            activation_type=import_flashinfer().fused_moe.ActivationType.Swiglu,
            **make_arguments(layout.pad_to(x, cols=self.hidden_size), self.scheme, self.capability, w13, w2),
            **arguments,
        )
        out = out[0] if isinstance(out, list | tuple) else out
        return out[:, : self.config.hidden_size]

    def _entry(self) -> Any:
        fused_moe, routed = import_flashinfer().fused_moe, "moe" if self.routes else "routed_moe"
        if isinstance(self.scheme, NVFP4):
            return getattr(fused_moe, f"trtllm_fp4_block_scale_{routed}")
        scales = "per_channel" if self.scheme.activation == "per_token" else "per_tensor"
        return getattr(fused_moe, f"trtllm_fp8_{scales}_scale_{routed}")


class FlashInferTrtllmRouted(TrtllmRunner):
    """Our router's choices: with float32 weights where this FlashInfer takes them, else packed with BF16 ones."""

    name: ClassVar[str] = "flashinfer_trtllm_routed"
    routes: ClassVar[bool] = False

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: Packed, w2: Packed) -> Tensor:
        if not len(x):
            return x
        with self.guard.serving(len(x)):
            return self._run(x, ids, weights, w13, w2)

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, w13: Packed, w2: Packed) -> Tensor:
        pairs = takes_pairs(self._entry())
        choices = (ids.int(), weights.float()) if pairs else pack_choices(ids, weights)
        # with choices that are made the method says nothing; this one passes the checks of every version
        method = import_flashinfer().fused_moe.RoutingMethodType.Renormalize
        return self._call(x, w13, w2, topk_ids=choices, routing_method_type=method)

    def run_random(self, x: Tensor, logits: Tensor, w13: Packed, w2: Packed) -> Tensor:
        return self._run(x, *route(logits, self.config), w13, w2)


class FlashInferTrtllm(TrtllmRunner):
    """Routing in the kernel, whose weights are BF16; it writes down which experts it chose."""

    name: ClassVar[str] = "flashinfer_trtllm"
    routes: ClassVar[bool] = True

    @classmethod
    def unsupported(cls, config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype) -> str | None:
        reason = super().unsupported(config, scheme, capability, dtype)
        if reason is None and isinstance(scheme, FP8) and scheme.activation == "per_token":
            return "with per-token FP8 the kernel does not tell which experts it chose"
        return reason or (None if routing_method(config) else "the kernel has no such router")

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: Packed, w2: Packed) -> Tensor:
        raise AssertionError("this runner routes by itself: apply_logits")

    def apply_logits(
        self, x: Tensor, logits: Tensor, bias: Tensor | None, w13: Packed, w2: Packed
    ) -> tuple[Tensor, Tensor]:
        """x [num_tokens, hidden_size], logits [num_tokens, num_experts], the choice's bias [num_experts] or None ->
        the layer's output, and the chosen experts int16 [num_tokens, top_k]."""
        ids = torch.full((len(x), self.config.top_k), -1, dtype=torch.int16, device=x.device)
        if not len(x):
            return x, ids
        with self.guard.serving(len(x)):
            return self._run(x, logits, bias, w13, w2, ids), ids

    def _run(self, x: Tensor, logits: Tensor, bias: Tensor | None, w13: Packed, w2: Packed, ids: Tensor) -> Tensor:
        config, method = self.config, routing_method(self.config)
        assert method is not None
        routing: dict[str, Any] = {"routing_logits": logits.float().contiguous(), "routing_replay_out": ids}
        routing["routing_method_type"] = import_flashinfer().fused_moe.RoutingMethodType[method]
        if method == "DeepSeekV3":
            routing["routing_bias"] = logits.new_zeros(config.num_experts).float() if bias is None else bias
            routing |= {"n_group": config.n_group, "topk_group": config.topk_group}
            routing["routed_scaling_factor"] = config.routed_scaling_factor
        return self._call(x, w13, w2, **routing)

    def run_random(self, x: Tensor, logits: Tensor, w13: Packed, w2: Packed) -> Tensor:
        ids = torch.empty(len(x), self.config.top_k, dtype=torch.int16, device=x.device)
        return self._run(x, logits, None, w13, w2, ids)


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
