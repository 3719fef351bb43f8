"""`FusedFlux`: FLUX.1's forward, the same function as diffusers' `FluxTransformer2DModel.forward`, in few launches.

Both streams of a block are rows of one tensor (`streams.py`), so that one launch serves both between their linears. A
residual waits for the norm that reads it: `Pending` is (y, gate) of h += gate * y.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from msgspec import Struct
from torch import Tensor

from ....quant.gpu.quantize import quantize_fp8
from ..linears import Linears
from .activations import Activations
from .attention import attend, attend_fp8
from .fp8_processor import FP8FluxAttnProcessor
from .gelu import gelu, join_gelu
from .layers import Layer, as_read_by
from .modulate import add_gated, norm_modulate
from .qk_rope import qk_norm_rope
from .streams import Streams

NEEDED = {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids"}
EPS = 1e-6  # of every norm of the architecture
Rotary = tuple[Tensor, Tensor]  # cos, sin
Pending = tuple[Tensor, Tensor] | None


class Both(Struct, frozen=True):
    """A linear of the text stream and one of the image stream."""

    text: Layer
    image: Layer

    @property
    def layers(self) -> tuple[Layer, Layer]:
        return self.text, self.image

    def __call__(self, x: Activations, streams: Streams, *, with_gelu: bool = False) -> Tensor:
        """Rows of the streams -> rows of the streams, `with_gelu` of plain layers activated."""
        out = torch.empty(streams.num_rows, self.image.num_rows, dtype=torch.bfloat16, device=x.device)
        for layer, part in zip(self.layers, streams.parts, strict=True):
            if with_gelu:
                layer.gelu(x[part], out[part])
            else:
                layer(x[part], out[part])
        return out


class DoubleBlock(Struct, frozen=True):
    """Text and image with weights of their own, and attention over both. `norms`: of text q and k, image q and k."""

    modulation: Both
    qkv: Both
    out: Both
    inner: Both
    outer: Both
    norms: tuple[Tensor, ...]


class SingleBlock(Struct, frozen=True):
    """Attention beside an MLP, over joint rows. `norms`: of q and k."""

    modulation: Layer
    qkv: Layer
    inner: Layer
    outer: Layer
    norms: tuple[Tensor, ...]


class FusedFlux:
    """The model at one precision. Raises `UnsupportedError` where a linear is not stored so that it can be fused."""

    TRANSFORMER: ClassVar[str] = "FluxTransformer2DModel"

    def __init__(self, module: Any, linears: Mapping[tuple[str, ...], Linears], precision: str) -> None:
        self.module, self._linears, self._precision = module, linears, precision
        self.num_heads = module.config.num_attention_heads
        found = {type(processor) for processor in module.attn_processors.values()}
        self._processor = FP8FluxAttnProcessor if found == {FP8FluxAttnProcessor} else FluxAttnProcessor
        self.embed = Both(self._layer("context_embedder"), self._layer("x_embedder"))
        self.double = [self._double(i) for i in range(len(module.transformer_blocks))]
        self.single = [self._single(i) for i in range(len(module.single_transformer_blocks))]
        self.last_modulation, self.last = self._layer("norm_out.linear"), self._layer("proj_out")

    def layers(self) -> Iterator[Layer]:
        """All that this forward computes with, but for the embedding of timestep, guidance and pooled text."""
        yield from self.embed.layers
        for block in self.double:
            for both in (block.modulation, block.qkv, block.out, block.inner, block.outer):
                yield from both.layers
        for block in self.single:
            yield from (block.modulation, block.qkv, block.inner, block.outer)
        yield from (self.last_modulation, self.last)

    def unsupported(self, given: Mapping[str, Any]) -> str | None:
        """Why a call with these keywords (those that are not None) goes to the model's own forward, or None."""
        unlike = sorted(given.keys() - {"guidance"} ^ NEEDED)
        if unlike:
            return f"it was called with or without {', '.join(unlike)}"
        if given["txt_ids"].ndim != 2 or given["img_ids"].ndim != 2:
            return "ids with a batch dimension"
        floats = [given[name] for name in ("hidden_states", "encoder_hidden_states", "pooled_projections")]
        if any(one.dtype != torch.bfloat16 for one in floats):
            return "its inputs are not BF16"
        if torch.is_grad_enabled() and any(one.requires_grad for one in floats):
            return "gradients of its inputs are asked for"
        if any(layer.slot.meter is not None for layer in self.layers()):
            return "activations are watched"
        return changed_part(self.module, self._processor)

    def _layer(self, *names: str) -> Layer:
        parent, _, first = names[0].rpartition(".")
        siblings = [first, *names[1:]]
        return Layer(self._linears, tuple(f"{parent}.{name}" if parent else name for name in siblings), self._precision)

    def _both(self, prefix: str, text: tuple[str, ...], image: tuple[str, ...]) -> Both:
        return Both(*(self._layer(f"{prefix}.{names[0]}", *names[1:]) for names in (text, image)))

    def _double(self, i: int) -> DoubleBlock:
        path, attn = f"transformer_blocks.{i}", self.module.transformer_blocks[i].attn
        norms = attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k
        return DoubleBlock(
            modulation=self._both(path, ("norm1_context.linear",), ("norm1.linear",)),
            qkv=self._both(f"{path}.attn", ("add_q_proj", "add_k_proj", "add_v_proj"), ("to_q", "to_k", "to_v")),
            out=self._both(path, ("attn.to_add_out",), ("attn.to_out.0",)),
            inner=self._both(path, ("ff_context.net.0.proj",), ("ff.net.0.proj",)),
            outer=self._both(path, ("ff_context.net.2",), ("ff.net.2",)),
            norms=tuple(norm.weight for norm in norms),
        )

    def _single(self, i: int) -> SingleBlock:
        path, attn = f"single_transformer_blocks.{i}", self.module.single_transformer_blocks[i].attn
        return SingleBlock(
            modulation=self._layer(f"{path}.norm.linear"),
            qkv=self._layer(f"{path}.attn.to_q", "to_k", "to_v"),
            inner=self._layer(f"{path}.proj_mlp"),
            outer=self._layer(f"{path}.proj_out"),
            norms=(attn.norm_q.weight, attn.norm_k.weight),
        )

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """diffusers' arguments -> the velocity [batch, image tokens, channels]."""
        streams = Streams(len(hidden_states), encoder_hidden_states.shape[1], hidden_states.shape[1])
        h = torch.empty(streams.num_rows, self.embed.image.num_rows, dtype=torch.bfloat16, device=hidden_states.device)
        given = encoder_hidden_states.flatten(0, 1), hidden_states.flatten(0, 1)
        for layer, part, rows in zip(self.embed.layers, streams.parts, given, strict=True):
            layer(_activations(rows, layer.reads_codes), h[part])
        tables = self._modulations(timestep, guidance, pooled_projections)
        cos, sin = self.module.pos_embed(torch.cat((txt_ids, img_ids)))
        rotary = cos[:, ::2].contiguous(), sin[:, ::2].contiguous()  # every number stands there twice
        pending: Pending = None
        for block in self.double:
            pending = self._run_double(block, h, pending, next(tables), rotary, streams)
        if pending is not None:
            add_gated(h, *pending, streams)
        h, pending, joint = streams.join(h), None, streams.joined
        for block in self.single:
            pending = self._run_single(block, h, pending, next(tables), rotary, joint)
        scale, shift = next(tables).chunk(2, dim=-1)
        x = norm_modulate(h, scale, shift, joint, EPS, pending, **as_read_by(self.last))
        return self.last(x).view(streams.batch, -1, self.last.num_rows)[:, streams.text :]

    def _modulations(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Iterator[Tensor]:
        """[num_streams, batch, parts * hidden_size] of every block and of the end, when it is asked for: from one
        vector a sample, which is activated and quantized once."""
        conditions = [timestep.to(torch.bfloat16) * 1000]  # in the model's dtype, as diffusers rounds it
        if guidance is not None:
            conditions.append(guidance.to(torch.bfloat16) * 1000)
        vector = F.silu(self.module.time_text_embed(*conditions, pooled))
        x = _activations(vector, as_read_by(*itertools.chain(*self._modulation_layers()))["quantize"])
        for layers in self._modulation_layers():
            table = vector.new_empty(len(layers), len(vector), layers[0].num_rows)
            for rows, layer in zip(table, layers, strict=True):
                layer(x, rows)
            yield table

    def _modulation_layers(self) -> list[tuple[Layer, ...]]:
        """Of every block's streams, and of the end."""
        singles = [(block.modulation,) for block in self.single]
        return [*(block.modulation.layers for block in self.double), *singles, (self.last_modulation,)]

    def _run_double(
        self, block: DoubleBlock, h: Tensor, pending: Pending, table: Tensor, rotary: Rotary, streams: Streams
    ) -> Pending:
        shift, scale, gate, inner_shift, inner_scale, inner_gate = table.chunk(6, dim=-1)
        x = norm_modulate(h, scale, shift, streams, EPS, pending, **as_read_by(*block.qkv.layers))
        attention = self._attend(block.qkv(x, streams), block.norms, rotary, streams)
        y = block.out(join_gelu(attention, None, streams, **as_read_by(*block.out.layers)), streams)
        x = norm_modulate(h, inner_scale, inner_shift, streams, EPS, (y, gate), **as_read_by(*block.inner.layers))
        return block.outer(self._inner(block, x, streams), streams), inner_gate

    def _attend(self, qkv: Tensor, norms: tuple[Tensor, ...], rotary: Rotary, streams: Streams) -> Tensor:
        """Joint rows, as the model's processors attend."""
        if self._precision == "quantized" and self._processor is FP8FluxAttnProcessor:
            return attend_fp8(qkv, norms, *rotary, streams, EPS)
        return attend(qk_norm_rope(qkv, norms, *rotary, streams, EPS), streams, self.num_heads)

    def _inner(self, block: DoubleBlock, x: Activations, streams: Streams) -> Activations:
        """What comes out of an MLP's GELU."""
        if all(layer.is_plain for layer in (*block.inner.layers, *block.outer.layers)):
            return Activations(block.inner(x, streams, with_gelu=True))
        return gelu(block.inner(x, streams), streams, **as_read_by(*block.outer.layers))

    def _run_single(
        self, block: SingleBlock, h: Tensor, pending: Pending, table: Tensor, rotary: Rotary, joint: Streams
    ) -> Pending:
        shift, scale, gate = table.chunk(3, dim=-1)
        x = norm_modulate(h, scale, shift, joint, EPS, pending, **as_read_by(block.qkv, block.inner))
        attention = self._attend(block.qkv(x), block.norms, rotary, joint)
        if block.inner.is_plain and block.outer.is_plain:
            return block.outer.sum_over(attention, block.inner.gelu(x)), gate
        return block.outer(join_gelu(attention, block.inner(x), joint, **as_read_by(block.outer))), gate


def changed_part(module: Any, processor: type) -> str | None:
    """What someone has hung into the model that its own forward would call, or None."""
    for part in module.modules():
        if part is not module and (part._forward_hooks or part._forward_pre_hooks or hasattr(part, "_diffusers_hook")):
            return f"a {type(part).__name__} of it has hooks"
        if type(getattr(part, "processor", None)) not in (processor, type(None)):
            return f"attention is computed by a {type(part.processor).__name__}"
    return None


def _activations(rows: Tensor, quantize: bool) -> Activations:
    return Activations(rows, *(quantize_fp8(rows.contiguous()) if quantize else ()))
