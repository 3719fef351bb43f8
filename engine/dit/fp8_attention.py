"""FP8 attention: what it is, and exactly that in plain torch. The kernels of `gpu/` are held against it.

    scale_q = sqrt(head_dim) max |norm weights| / 448   so for k: what is normed and rotated is never larger
    scale_v = max |v| / 448                             of a head's tile of 128 keys; 2^-126 at the least
    x = log2(e) q k^T scale_q scale_k / sqrt(head_dim) - m,   m: the row's maximum over the tiles so far
    bits of p = round(128 float16(y)),   y = (x + 15 - 0.043) / 16, 0 at the least
    out = sum p v scale_v / sum p

q, k and v are E4M3 codes, rounded once from what BF16 attention reads. So is p, of 2^(x + 8): E4M3's eight steps an
octave are laid evenly over its logarithm, which needs no exponential (Schraudolph, 1999; 0.043 halves the error); below
2^-15 of a row's maximum there is nothing. Sums are float32; on a GPU those within a tile stay in the tensor cores,
which keep fewer bits. Tiles come in the order last, first, second, ... Scales of v below 2^-32 of a head's largest
count as that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from msgspec import Struct
from torch import Tensor

E4M3_MAX = 448.0
TILE = 128  # keys
P_BIAS = 14.957  # 15 - 0.043
LEAST_RATIO = 2.0**-32
LEAST_SCALE = 2.0**-126  # a tile of zeros must not make the others look small


class AttentionCodes(Struct, frozen=True):
    """E4M3 `q`, `k` [batch, num_heads, tokens, head_dim]; `v` [batch, num_heads, head_dim, tiles * 128], zeros behind
    the last token, every 16 tokens in the order of `V_ORDER`. Decode scales, float32: `qk_scales` [2], `v_scales`
    [batch, num_heads, tiles]."""

    q: Tensor
    k: Tensor
    v: Tensor
    qk_scales: Tensor
    v_scales: Tensor


# Tokens of v within 16: a thread's probabilities are the four that it multiplies. 0 1 8 9 | 2 3 10 11 | 4 5 12 13 | ...
V_ORDER = [8 * half + 2 * column + i for column in range(4) for half in range(2) for i in range(2)]


def norm_scale(weights: Sequence[Tensor]) -> Tensor:
    """Norm weights [head_dim] of every stream -> the decode scale of q or k, float32 scalar; 1 where all are zero."""
    head_dim = weights[0].numel()
    amax = torch.stack([weight.detach().float().abs().amax() for weight in weights]).amax()
    scale = amax * norm_factor(head_dim)
    return torch.where(scale > 0, scale, 1.0)


def norm_factor(head_dim: int) -> float:
    return math.sqrt(head_dim) / E4M3_MAX


def quantize(q: Tensor, k: Tensor, v: Tensor, qk_scales: Tensor) -> AttentionCodes:
    """q, k, v [batch, tokens, num_heads, head_dim], normed and rotated; float32 scales [2] of q and k."""
    batch, tokens, num_heads, head_dim = v.shape
    codes = [_codes(x, scale).transpose(1, 2) for x, scale in zip((q, k), qk_scales, strict=True)]
    tiles = -(-tokens // TILE)
    padded = v.new_zeros(batch, tiles * TILE, num_heads, head_dim, dtype=torch.float32)
    padded[:, :tokens] = v
    tiled = padded.view(batch, tiles, TILE, num_heads, head_dim)
    amax = tiled.abs().amax((2, 4))  # [batch, tiles, num_heads]
    scales = (amax / torch.full_like(amax, E4M3_MAX)).clamp(min=LEAST_SCALE)  # a GPU multiplies by a number's inverse
    codes_v = _codes(tiled, scales[:, :, None, :, None]).view(torch.uint8)
    ordered = codes_v.unflatten(2, (-1, 16))[:, :, :, V_ORDER].flatten(1, 3).permute(0, 2, 3, 1)
    q8, k8 = (one.view(torch.uint8).contiguous().view(torch.float8_e4m3fn) for one in codes)
    v8 = ordered.contiguous().view(torch.float8_e4m3fn)
    return AttentionCodes(q8, k8, v8, qk_scales, scales.transpose(1, 2).contiguous())


def attend(codes: AttentionCodes) -> Tensor:
    """-> float32 [batch, tokens, num_heads, head_dim]; sample by sample and head by head, whatever stands beside."""
    batch, num_heads = codes.q.shape[:2]
    heads = [[_attend_head(codes, i, j) for j in range(num_heads)] for i in range(batch)]
    return torch.stack([torch.stack(sample, 1) for sample in heads])


def _attend_head(codes: AttentionCodes, sample: int, head: int) -> Tensor:
    """[tokens, head_dim]."""
    q, k = (one[sample, head].float() for one in (codes.q, codes.k))
    restored = [V_ORDER.index(i) for i in range(16)]
    v = codes.v[sample, head].float().unflatten(1, (-1, 16))[:, :, restored].flatten(1).t()
    factor = codes.qk_scales[0] * codes.qk_scales[1] * (math.log2(math.e) / math.sqrt(q.shape[1]))
    scales = codes.v_scales[sample, head]
    scales = torch.maximum(scales, scales.max() * LEAST_RATIO)
    m = q.new_full((len(q), 1), -math.inf)
    total, out = q.new_zeros(len(q), 1), torch.zeros_like(q)
    for tile in (len(scales) - 1, *range(len(scales) - 1)):
        part = slice(tile * TILE, min((tile + 1) * TILE, len(k)))
        s = (q @ k[part].t()) * factor
        before, m = m, torch.maximum(m, s.amax(1, keepdim=True))
        p, alpha = _probabilities(s - m), torch.exp2(before - m)
        total = total * alpha + p.sum(1, keepdim=True)
        out = out * alpha + p @ v[part] * scales[tile]
    return out / total


def _probabilities(x: Tensor) -> Tensor:
    """256 2^x in E4M3, as float32."""
    bits = (128 * ((x + P_BIAS) / 16).clamp(min=0).half().float()).round()
    return bits.to(torch.uint8).view(torch.float8_e4m3fn).float()


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
