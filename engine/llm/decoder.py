"""The decoder that all families share: embeddings, decoder layers, logits.

Tokens of all sequences lie flat in one dimension; only attention knows which sequence a token belongs to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...moe import Choices, summed
from ...quant import FP8Rows, values_of
from .attention import Attend, AttentionSpec
from .decoder_config import DecoderConfig
from .layers.attention import Attention, KVScales
from .layers.latent_attention import LatentAttention
from .layers.mlp import MLP
from .layers.norms import Norm
from .layers.rope import Rotary, rotary
from .layers.sparse_mlp import SparseMLP
from .parts import Parts


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The last sum, of experts too, is left to who comes next: it is one launch with the norm that follows.
    """

    NORM_BEFORE_MLP = "post_attention_layernorm"

    def __init__(self, parts: Parts, config: DecoderConfig, layer: int, kv_scales: KVScales | None) -> None:
        self.prefix = prefix = f"model.layers.{layer}."
        self.norm, self.kind = Norm(config.norm, config.rms_norm_eps), config.layers[layer]
        self.input_norm = parts.plain(prefix + "input_layernorm", config.hidden_size)
        self.post_norm = parts.plain(prefix + self.NORM_BEFORE_MLP, config.hidden_size)
        latent = config.attention.latent is not None
        self.attention = LatentAttention(parts, config, layer) if latent else Attention(parts, config, layer, kv_scales)
        sparse, size = config.moe is not None and not self.kind.dense, config.intermediate_size
        self.mlp = SparseMLP(parts, config, layer) if sparse else MLP(parts, config, prefix + "mlp.", size)

    def __call__(
        self, x: Tensor, y: Tensor | Choices | None, rotary: Rotary, attend: Attend, routed: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | Choices]:
        """The input is x + y (None: nothing), and so is the output."""
        x, normed = self.norm.of_sum(x, y, self.input_norm, self.attention.reads)
        x, normed = self.norm.of_sum(x, self.attention(normed, rotary, attend), self.post_norm, self.mlp.reads)
        return x, self.feed_forward(normed, routed)

    def feed_forward(self, x: Tensor | FP8Rows, routed: list[Tensor] | None) -> Tensor | Choices:
        return self.mlp(x, routed) if isinstance(self.mlp, SparseMLP) else self.mlp(x)


class SandwichLayer(DecoderLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))) (Gemma 2 and 3)."""

    NORM_BEFORE_MLP = "pre_feedforward_layernorm"

    def __init__(self, parts: Parts, config: DecoderConfig, layer: int, kv_scales: KVScales | None) -> None:
        super().__init__(parts, config, layer, kv_scales)
        self.attention_out_norm = parts.plain(self.prefix + "post_attention_layernorm", config.hidden_size)
        self.mlp_out_norm = parts.plain(self.prefix + "post_feedforward_layernorm", config.hidden_size)

    def __call__(
        self, x: Tensor, y: Tensor | Choices | None, rotary: Rotary, attend: Attend, routed: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.norm.of_sum(x, y, self.input_norm, self.attention.reads)
        y = self.norm(self.attention(normed, rotary, attend), self.attention_out_norm)
        x, normed = self.norm.of_sum(x, y, self.post_norm, self.mlp.reads)
        return x, self.norm(summed(self.feed_forward(normed, routed)), self.mlp_out_norm)


class Decoder:
    """A causal language model over flat tokens."""

    def __init__(self, config: DecoderConfig, parts: Parts, kv_scales: KVScales | None = None) -> None:
        self.config, self.dtype = config, parts.dtype
        self.device = parts.capability.device
        self.embed = parts.plain("model.embed_tokens", config.vocab_size, config.hidden_size)
        layer_type = SandwichLayer if config.sandwich_norms else DecoderLayer
        self.layers = [layer_type(parts, config, layer, kv_scales) for layer in range(config.num_layers)]
        self.final_norm = parts.plain("model.norm", config.hidden_size)
        head = {"lm_head": config.vocab_size}
        self.head = None if config.tied else parts.linear("", head, config.hidden_size)
        self.matmul = parts.matmul()
        self.norm = Norm(config.norm, config.rms_norm_eps)
        self.inv_freqs = [rope.inv_freq.to(self.device) for rope in config.ropes]
        scale = config.embed_scale
        self.embed_scale = None if scale is None else torch.tensor(scale, dtype=self.dtype).item()
        self.slots = parts.slots
        self.capability = parts.capability

    def uncapturable(self) -> str | None:
        """Why a step cannot be captured in a CUDA graph, or None."""
        for layer in self.layers:
            if isinstance(layer.mlp, SparseMLP) and not layer.mlp.experts.runner.capturable:
                return f"the MoE runner {layer.mlp.experts.runner.name} asks the host"
        return None

    @property
    def rounds_kv(self) -> bool:
        """Whether keys and values are what FP8 gives back of them."""
        return any(isinstance(layer.attention, Attention) and layer.attention.kv_scales for layer in self.layers)

    def unwritable_as_codes(self) -> str | None:
        """Why keys and values cannot be written to a cache as FP8 codes, or None."""
        attentions = [layer.attention for layer in self.layers]
        if all(isinstance(attention, Attention) and attention.fusible for attention in attentions):
            return None
        return "no kernel computes this model's norms and rotations of q and k"

    @property
    def routing(self) -> tuple[int, int]:
        """(layers with routed experts, experts a token): the shape of one token's routed experts."""
        moe = self.config.moe
        return sum(isinstance(layer.mlp, SparseMLP) for layer in self.layers), 0 if moe is None else moe.top_k

    @property
    def attention_specs(self) -> list[AttentionSpec]:
        """Every layer's, in layer order: what a KV cache must hold."""
        return [layer.attention.spec for layer in self.layers]

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend, routed: list[Tensor] | None = None) -> Tensor:
        """ids, positions int64 [num_tokens] -> final hidden states [num_tokens, hidden_size].

        `routed` collects the expert ids [num_tokens, top_k] of every MoE layer.
        """
        rotaries = [
            rotary(inv_freq, rope.factor, positions, self.dtype)
            for inv_freq, rope in zip(self.inv_freqs, self.config.ropes, strict=True)
        ]
        x = F.embedding(ids, self.embed).to(self.dtype)
        y: Tensor | Choices | None = None
        if self.embed_scale is not None:
            x = x * self.embed_scale
        for layer in self.layers:
            x, y = layer(x, y, rotaries[layer.kind.rope], attend, routed)
        return values_of(self.norm.of_sum(x, y, self.final_norm)[1])

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, vocab_size], in the engine's dtype."""
        logits = self.matmul(hidden, self.embed) if self.head is None else self.head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else (logits / cap).tanh() * cap
