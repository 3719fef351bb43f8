"""Attention over all tokens of a sample, from joint rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .streams import Streams

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(qkv: Tensor, streams: Streams, num_heads: int) -> Tensor:
    """BF16 joint rows [num_rows, 3 * num_heads * head_dim] -> [num_rows, num_heads * head_dim]."""
    q, k, v = qkv.view(streams.batch, -1, 3, num_heads, qkv.shape[1] // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(len(qkv), -1)
