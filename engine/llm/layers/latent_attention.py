"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ....quant import FP8Rows, Reads
from ..attention import Attend, AttentionSpec
from ..decoder_config import DecoderConfig
from ..parts import Parts
from .norms import Norm
from .rope import Rotary, select_rotate

LATENT_EPS = 1e-6  # of the norms of the latents, whatever `rms_norm_eps` says


class LatentAttention:
    """Keys and values come from a low-rank latent and one rotary key that all heads share.

    The latent is expanded to every head's key (nope, then rope) and value before attention sees them: exact, and
    the cache holds expanded keys and values.
    """

    def __init__(self, parts: Parts, config: DecoderConfig, layer: int) -> None:
        attention, kind = config.attention, config.layers[layer]
        assert attention.latent is not None
        self.config = latent = attention.latent
        self.num_heads = heads = attention.num_heads
        self.key_split = [latent.nope_dim, latent.rope_dim]
        key_dim = sum(self.key_split)
        self.spec = AttentionSpec(
            layer, heads, key_dim, latent.value_dim, attention.scale, kind.window, attention.softcap
        )
        self.prefix = prefix = f"model.layers.{layer}.self_attn."
        self._make_queries(parts, config, heads * key_dim)
        rows = {"kv_a_proj_with_mqa": latent.kv_rank + latent.rope_dim}
        self.kv_a = parts.linear(prefix, rows, config.hidden_size, bias=attention.qkv_bias)
        self.kv_norm = parts.plain(prefix + "kv_a_layernorm", latent.kv_rank)
        self.kv_b = parts.linear(prefix, {"kv_b_proj": heads * (latent.nope_dim + latent.value_dim)}, latent.kv_rank)
        out = {"o_proj": config.hidden_size}
        self.out = parts.linear(prefix, out, heads * latent.value_dim, bias=attention.out_bias)
        self.norm = Norm(config.norm, LATENT_EPS)
        self.rotate = select_rotate(config.ropes[kind.rope], latent.rope_dim)

    def _make_queries(self, parts: Parts, config: DecoderConfig, rows: int) -> None:
        rank, bias = self.config.q_rank, config.attention.qkv_bias
        if rank is None:
            self.q_a, self.q_b = None, parts.linear(self.prefix, {"q_proj": rows}, config.hidden_size)
            return
        self.q_a = parts.linear(self.prefix, {"q_a_proj": rank}, config.hidden_size, bias=bias)
        self.q_norm = parts.plain(self.prefix + "q_a_layernorm", rank)
        self.q_b = parts.linear(self.prefix, {"q_b_proj": rows}, rank)

    @property
    def reads(self) -> Reads:
        queries = self.q_b if self.q_a is None else self.q_a
        return "codes" if self.kv_a.takes_codes and queries.takes_codes else "values"

    def __call__(self, x: Tensor | FP8Rows, rotary: Rotary, attend: Attend) -> Tensor:
        latent, k_rope = self.kv_a(x).split([self.config.kv_rank, self.config.rope_dim], -1)
        kv = self.kv_b(self.norm(latent, self.kv_norm)).unflatten(-1, (self.num_heads, -1))
        k_nope, v = kv.split([self.config.nope_dim, self.config.value_dim], -1)
        k_rope = self.rotate(k_rope[:, None], *rotary).expand(-1, self.num_heads, -1)
        q = self._queries(x, rotary)
        return self.out(attend(self.spec, q, torch.cat([k_nope, k_rope], -1), v).flatten(-2))

    def _queries(self, x: Tensor | FP8Rows, rotary: Rotary) -> Tensor:
        """[num_tokens, heads, nope_dim + rope_dim]"""
        if self.q_a is not None:
            x = self.norm(self.q_a(x), self.q_norm)
        nope, rope = self.q_b(x).unflatten(-1, (self.num_heads, -1)).split(self.key_split, -1)
        return torch.cat([nope, self.rotate(rope, *rotary)], -1)
