"""Attention over all tokens of a sample, from joint rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .fp8_processor import attention_on
from .qk_rope import qkv_codes
from .streams import Streams

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(qkv: Tensor, streams: Streams, num_heads: int) -> Tensor:
    """BF16 joint rows [num_rows, 3 * num_heads * head_dim] -> [num_rows, num_heads * head_dim]."""
    q, k, v = qkv.view(streams.batch, -1, 3, num_heads, qkv.shape[1] // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(len(qkv), -1)


def attend_fp8(
    qkv: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, streams: Streams, eps: float
) -> Tensor:
    """The same of q, k and v as the linear gives them, as FP8 (`fp8_attention.py`); arguments as `qk_norm_rope`'s."""
    out = attention_on(qkv.device)(qkv_codes(qkv, weights, cos, sin, streams, eps))
    return out.reshape(len(qkv), -1).to(torch.bfloat16)
