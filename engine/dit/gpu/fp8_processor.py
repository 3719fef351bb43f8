"""FP8 attention in diffusers' own forward of FLUX.1, and whether it can be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from ....quant import Capability, UnsupportedError
from ..fp8_attention import AttentionCodes, attend, norm_scale, quantize
from ..slot_linear import PrecisionSwitch

TRANSFORMERS = ("FluxTransformer2DModel",)
HEAD_DIM = 128  # of the kernel


class FP8FluxAttnProcessor(FluxAttnProcessor):
    """diffusers' processor, with FP8 attention while the linears compute in "quantized"."""

    def __init__(self, switch: PrecisionSwitch, attend: Callable[[AttentionCodes], Tensor]) -> None:
        super().__init__()
        self.switch, self.attend = switch, attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if self.switch.now != "quantized":
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)  # pyright: ignore[reportArgumentType]
        if attention_mask is not None:
            raise UnsupportedError("attention='fp8' in a call with a mask", ["it reads every token"])
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        rows = self._attend(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        if encoder_hidden_states is None:
            return rows
        out = attn.to_out[1](attn.to_out[0](rows[:, text:].contiguous()))
        return out, attn.to_add_out(rows[:, :text].contiguous())

    def _attend(self, attn: Any, image: Tensor, text: Tensor | None, rotary: Any) -> Tensor:
        """Joint rows [batch, tokens, num_heads * head_dim]."""
        split = [_heads(linear(image), attn.head_dim) for linear in (attn.to_q, attn.to_k, attn.to_v)]
        q, k, v = attn.norm_q(split[0]), attn.norm_k(split[1]), split[2]
        weights = [[attn.norm_q.weight], [attn.norm_k.weight]]
        if text is not None:
            linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            split = [_heads(linear(text), attn.head_dim) for linear in linears]
            q = torch.cat([attn.norm_added_q(split[0]), q], dim=1)
            k = torch.cat([attn.norm_added_k(split[1]), k], dim=1)
            v = torch.cat([split[2], v], dim=1)
            weights = [[attn.norm_added_q.weight, *weights[0]], [attn.norm_added_k.weight, *weights[1]]]
        q, k = (cast(Tensor, apply_rotary_emb(x, rotary, sequence_dim=1)) for x in (q, k))
        scales = torch.stack([norm_scale(one) for one in weights])
        return self.attend(quantize(q, k, v, scales)).reshape(*q.shape[:2], -1).to(image.dtype)


def _heads(rows: Tensor, head_dim: int) -> Tensor:
    return rows.unflatten(-1, (-1, head_dim))


def use_fp8_attention(module: Any, capability: Capability, switch: PrecisionSwitch, *, quantized: bool) -> None:
    """Let the model's forwards attend in FP8; `UnsupportedError` with every reason why it cannot."""
    name, head_dim, reasons = type(module).__name__, module.config.get("attention_head_dim"), []
    if name not in TRANSFORMERS:
        reasons.append(f"{', '.join(TRANSFORMERS)} has it, this is a {name}")
    if not quantized:
        reasons.append("no layer is quantized, and BF16 layers go with BF16 attention: give a quant")
    if capability.device.type == "cuda":
        if capability.sm != 90 or "triton" not in capability.libraries:
            reasons.append(f"its kernel is for Hopper and wants triton, this is {capability}")
        if head_dim != HEAD_DIM:
            reasons.append(f"its kernel is for heads of {HEAD_DIM}, this model's are {head_dim}")
    if reasons:
        raise UnsupportedError("attention='fp8'", reasons)
    module.set_attn_processor(FP8FluxAttnProcessor(switch, attention_on(capability.device)))


def attention_on(device: torch.device) -> Callable[[AttentionCodes], Tensor]:
    """How codes are attended: by the kernel on a GPU, else as it is defined."""
    if device.type != "cuda":
        return attend
    from .flash_fp8 import flash_fp8

    return flash_fp8
