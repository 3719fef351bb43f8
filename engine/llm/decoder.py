"""The decoder that all families share: embeddings, attention, MLP or routed experts, logits.

Tokens of all sequences lie flat in one dimension; only attention knows which sequence a token belongs to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...moe import RoutedExperts, route
from ...quant import BF16, Capability, Plain, QuantLinear, WeightSlot, plain_slot
from ...quant.numerics import decode_fp8, quantize_fp8_activation
from ..schemes import SchemeResolver
from .attention import Attend, AttentionSpec
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

    def plain(self, module: str, *shape: int, scheme: Plain = BF16, kept: bool = False) -> Tensor:
        """An unquantized tensor's served storage."""
        rows, *cols = shape
        slot = plain_slot([module], [rows], cols[0] if cols else None, scheme, self.capability, self.dtype, kept=kept)
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
        )
        self.slots += layer.slots
        return layer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, in float32, rounded before the product as transformers does."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [num_tokens, heads, head_dim]; cos and sin [num_tokens, 1, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Attention:
    """Grouped-query attention; q, k and v are one fused linear."""

    def __init__(self, parts: Parts, config: DecoderConfig, layer: int, kv_cache: str | None) -> None:
        self.config = config
        self.spec = AttentionSpec(
            layer, config.num_kv_heads, config.head_dim, config.head_dim, scale=config.head_dim**-0.5
        )
        prefix = f"model.layers.{layer}.self_attn."
        self.rows = {
            "q_proj": config.num_heads * config.head_dim,
            "k_proj": config.num_kv_heads * config.head_dim,
            "v_proj": config.num_kv_heads * config.head_dim,
        }
        self.qkv = parts.linear(prefix, self.rows, config.hidden_size, bias=config.attention_bias, fused="qkv_proj")
        out = {"o_proj": config.hidden_size}
        self.out = parts.linear(prefix, out, self.rows["q_proj"], bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = parts.plain(prefix + "q_norm", config.head_dim)
            self.k_norm = parts.plain(prefix + "k_norm", config.head_dim)
        self.kv_scales = (
            None
            if kv_cache is None
            else [
                parts.plain(f"{prefix}{module}", 1, scheme=Plain(torch.float32, tensor), kept=True)
                for module, tensor in (("k_proj", "k_scale"), ("v_proj", "v_scale"))
            ]
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.config.head_dim)) for part in self.qkv(x).split(list(self.rows.values()), -1)
        )
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm, self.config.rms_norm_eps)
            k = rms_norm(k, self.k_norm, self.config.rms_norm_eps)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if self.kv_scales is not None:
            k, v = (_round_to_fp8(value, scale) for value, scale in zip((k, v), self.kv_scales, strict=True))
        return self.out(attend(self.spec, q, k, v).flatten(-2))


def _round_to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """What an FP8 KV cache with this decode scale gives back."""
    return (decode_fp8(quantize_fp8_activation(x, scale)) * scale).to(x.dtype)


class MLP:
    """SwiGLU; gate and up are one fused linear."""

    def __init__(self, parts: Parts, config: DecoderConfig, layer: int) -> None:
        prefix, inner, bias = f"model.layers.{layer}.mlp.", config.intermediate_size, config.mlp_bias
        shards = {"gate_proj": inner, "up_proj": inner}
        self.gate_up = parts.linear(prefix, shards, config.hidden_size, bias=bias, fused="gate_up_proj")
        self.down = parts.linear(prefix, {"down_proj": config.hidden_size}, inner, bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class SparseMLP:
    """A router and routed experts."""

    def __init__(self, parts: Parts, config: DecoderConfig, layer: int) -> None:
        assert config.moe is not None
        prefix = f"model.layers.{layer}.{config.names.moe_block}"
        self.config = config.moe
        self.gate = parts.plain(f"{prefix}.gate", config.moe.num_experts, config.hidden_size)
        self.experts = parts.experts(config, f"{prefix}.experts")

    def __call__(self, x: Tensor, routed: list[Tensor] | None) -> Tensor:
        ids, weights = route(F.linear(x, self.gate), self.config)
        if routed is not None:
            routed.append(ids)
        return self.experts(x, ids, weights)


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, parts: Parts, config: DecoderConfig, layer: int, kv_cache: str | None) -> None:
        prefix = f"model.layers.{layer}."
        self.eps = config.rms_norm_eps
        self.input_norm = parts.plain(prefix + "input_layernorm", config.hidden_size)
        self.post_norm = parts.plain(prefix + "post_attention_layernorm", config.hidden_size)
        self.attention = Attention(parts, config, layer, kv_cache)
        sparse = config.moe is not None and layer not in config.dense_layers
        self.mlp = SparseMLP(parts, config, layer) if sparse else MLP(parts, config, layer)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, routed: list[Tensor] | None) -> Tensor:
        x = x + self.attention(rms_norm(x, self.input_norm, self.eps), cos, sin, attend)
        normed = rms_norm(x, self.post_norm, self.eps)
        return x + (self.mlp(normed, routed) if isinstance(self.mlp, SparseMLP) else self.mlp(normed))


class Decoder:
    """A causal language model over flat tokens."""

    def __init__(self, config: DecoderConfig, parts: Parts, kv_cache: str | None = None) -> None:
        self.config, self.dtype = config, parts.dtype
        self.device = parts.capability.device
        self.embed = parts.plain("model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(parts, config, layer, kv_cache) for layer in range(config.num_layers)]
        self.norm = parts.plain("model.norm", config.hidden_size)
        head = {"lm_head": config.vocab_size}
        self.head = None if config.tied else parts.linear("", head, config.hidden_size)
        self.inv_freq = config.inv_freq.to(self.device)
        self.slots = parts.slots

    @property
    def routing(self) -> tuple[int, int]:
        """(layers with routed experts, experts a token): the shape of one token's routed experts."""
        moe = self.config.moe
        return sum(isinstance(layer.mlp, SparseMLP) for layer in self.layers), 0 if moe is None else moe.top_k

    @property
    def attention_specs(self) -> list[AttentionSpec]:
        return [layer.attention.spec for layer in self.layers]

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend, routed: list[Tensor] | None = None) -> Tensor:
        """ids, positions int64 [num_tokens] -> final hidden states [num_tokens, hidden_size].

        `routed` collects the expert ids [num_tokens, top_k] of every MoE layer.
        """
        angles = positions[:, None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        cos = (angles.cos() * self.config.rope_scaling).to(self.dtype)
        sin = (angles.sin() * self.config.rope_scaling).to(self.dtype)
        x = F.embedding(ids, self.embed)
        for layer in self.layers:
            x = layer(x, cos, sin, attend, routed)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> float32 [num_tokens, vocab_size]."""
        return (F.linear(hidden, self.embed) if self.head is None else self.head(hidden)).float()
