"""Grouped-query attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ....quant import FP8Rows, Plain, Reads
from ....quant.numerics import decode_fp8, quantize_fp8_activation
from ..attention import Attend, AttentionSpec
from ..cached_attend import CachedAttend
from ..decoder_config import DecoderConfig
from ..parts import Parts
from .fused import has_fused_kernels
from .norms import Norm
from .rope import Rotary, select_rotate

KVScales = Literal["stored", "unit"]  # decode scales of an FP8 KV cache: a checkpoint's, or 1


class Attention:
    """q, k and v are one fused linear; RMS norm over every head of q and k, or over whole rows, where configured."""

    def __init__(self, parts: Parts, config: DecoderConfig, layer: int, kv_scales: KVScales | None) -> None:
        self.config = attention = config.attention
        kind, head_dim = config.layers[layer], attention.head_dim
        self.spec = AttentionSpec(
            layer,
            attention.num_kv_heads,
            head_dim,
            head_dim,
            attention.scale,
            kind.window,
            attention.softcap,
            attention.sinks,
        )
        self.prefix = prefix = f"model.layers.{layer}.self_attn."
        kv_rows = attention.num_kv_heads * head_dim
        self.rows = {"q_proj": attention.num_heads * head_dim, "k_proj": kv_rows, "v_proj": kv_rows}
        self.qkv = parts.linear(prefix, self.rows, config.hidden_size, bias=attention.qkv_bias, fused="qkv_proj")
        out = {"o_proj": config.hidden_size}
        self.out = parts.linear(prefix, out, self.rows["q_proj"], bias=attention.out_bias)
        self.norm = Norm(config.norm, config.rms_norm_eps)
        rope = config.ropes[kind.rope]
        self.rotate = select_rotate(rope, head_dim)
        self.fusible = attention.qk_norm != "row" and not rope.interleaved  # what `gpu/qkv.py` computes
        if attention.qk_norm is not None:
            per_head = attention.qk_norm == "head"
            self.q_norm = parts.plain(prefix + "q_norm", head_dim if per_head else self.rows["q_proj"])
            self.k_norm = parts.plain(prefix + "k_norm", head_dim if per_head else kv_rows)
        sinks = Plain(tensor="sinks")
        self.sinks = parts.plain(prefix[:-1], attention.num_heads, scheme=sinks) if attention.sinks else None
        self.kv_scales = None if kv_scales is None else self._kv_scales(parts, kv_scales)
        self.scales_matter = kv_scales == "stored"

    def _kv_scales(self, parts: Parts, kind: KVScales) -> tuple[Tensor, Tensor]:
        """Of k and v."""
        if kind == "unit":
            one = torch.ones(1, device=parts.capability.device)
            return one, one
        k, v = Plain(torch.float32, "k_scale"), Plain(torch.float32, "v_scale")
        return (
            parts.plain(self.prefix + "k_proj", 1, scheme=k, kept=True),
            parts.plain(self.prefix + "v_proj", 1, scheme=v, kept=True),
        )

    @property
    def reads(self) -> Reads:
        return "codes" if self.qkv.takes_codes else "values"

    def __call__(self, x: Tensor | FP8Rows, rotary: Rotary, attend: Attend) -> Tensor:
        qkv = self.qkv(x)
        if self.fusible and isinstance(attend, CachedAttend) and has_fused_kernels(qkv):
            out = self._attend_fused(qkv, rotary, attend)
        else:
            out = self._attend(qkv, rotary, attend)
        return self.out(out.flatten(-2))

    def _attend_fused(self, qkv: Tensor, rotary: Rotary, attend: CachedAttend) -> Tensor:
        """One launch from q, k, v to the cache. Where that holds codes, q takes k's scale, and the result v's."""
        from ..gpu.qkv import norm_rope_write

        cache, layer, norm = attend.cache, self.spec.layer, self.norm
        norms = None if self.config.qk_norm is None else (self.q_norm, self.k_norm)
        q = norm_rope_write(
            qkv, norms, norm.eps, norm.name, rotary, attend.slots,
            cache.keys[layer], cache.values[layer], self.config.num_heads, self.kv_scales,
        )  # fmt: skip
        if self.kv_scales is None or not (cache.holds_codes and self.scales_matter):
            return attend.read(self.spec, q, self.sinks)
        k_scale, v_scale = self.kv_scales
        return (attend.read(self.spec, (q * k_scale).to(q.dtype), self.sinks) * v_scale).to(q.dtype)

    def _attend(self, qkv: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        q, k, v = qkv.split(list(self.rows.values()), -1)
        if self.config.qk_norm == "row":
            q, k = self.norm(q, self.q_norm), self.norm(k, self.k_norm)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.norm(q, self.q_norm), self.norm(k, self.k_norm)
        q, k = self.rotate(q, *rotary), self.rotate(k, *rotary)
        if self.kv_scales is not None:
            k, v = (_round_to_fp8(value, scale) for value, scale in zip((k, v), self.kv_scales, strict=True))
        return attend(self.spec, q, k, v, self.sinks)


def _round_to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """What an FP8 KV cache with this decode scale gives back."""
    return (decode_fp8(quantize_fp8_activation(x, scale)) * scale).to(x.dtype)
