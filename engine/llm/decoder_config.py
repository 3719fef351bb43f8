"""`DecoderConfig`: what the decoder needs to know of a checkpoint, whatever family it is of."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from msgspec import Struct

from ...moe import MoeConfig
from ...moe.activation import ActivationName
from ...quant import JoinedLayout
from .layers.norms import NormName
from .layers.rope import Rope


class ModuleNames(Struct, frozen=True):
    """How a family's checkpoints name what differs; `renames` map a trainer's names onto the checkpoint's.

    `ignored`: (pattern over whole names, why such tensors are not needed). `joined_experts`: how a trainer's stacked
    expert tensors lie.
    """

    moe_block: str = "mlp"
    router: str = "gate"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    joined_experts: JoinedLayout = JoinedLayout()


class LatentConfig(Struct, frozen=True):
    """Multi-head latent attention: ranks of the latents (`q_rank` None: queries without one), sizes in each head."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


class AttentionConfig(Struct, frozen=True):
    """What attention is in every layer. `qk_norm`: an RMS norm over each head, or over all heads of a token at once."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "row"] | None = None
    softcap: float | None = None
    sinks: bool = False
    latent: LatentConfig | None = None


class LayerKind(Struct, frozen=True):
    """What differs from layer to layer: its rope (an index), its window, and whether it is dense in an MoE model."""

    rope: int = 0
    window: int | None = None
    dense: bool = False


class RouterConfig(Struct, frozen=True):
    """What a router holds besides its weight. `float32`: its logits are computed in float32 in any engine."""

    bias: bool = False
    correction_bias: bool = False
    float32: bool = False


class SharedExpertConfig(Struct, frozen=True):
    """An expert of every token; `gate` names the module whose sigmoid scales it."""

    intermediate_size: int
    module: str = "shared_experts"
    gate: str | None = None


class DecoderConfig(Struct, frozen=True):
    """A decoder with RoPE, and an MLP or routed experts in every layer.

    `sandwich_norms`: attention and MLP are normed going out, too. `embed_scale` multiplies embeddings, rounded to the
    engine's dtype first; `logit_softcap` c makes logits c * tanh(logits / c).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    max_position: int
    tied: bool
    attention: AttentionConfig
    ropes: tuple[Rope, ...]
    layers: tuple[LayerKind, ...]
    activation: ActivationName = "silu"
    mlp_bias: bool = False
    norm: NormName = "rms"
    sandwich_norms: bool = False
    embed_scale: float | None = None
    logit_softcap: float | None = None
    moe: MoeConfig | None = None
    router: RouterConfig = RouterConfig()
    shared: SharedExpertConfig | None = None
    names: ModuleNames = ModuleNames()

    @property
    def num_layers(self) -> int:
        return len(self.layers)


class Family(Protocol):
    """One file in `models/`: the architectures it reads, and how."""

    @property
    def ARCHITECTURES(self) -> tuple[str, ...]: ...

    def read_config(self, hf: Any) -> DecoderConfig: ...
