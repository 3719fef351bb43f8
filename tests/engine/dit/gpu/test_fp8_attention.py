"""FP8 attention: its definition against float64, and the kernels against the definition."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.dit import fp8_attention  # noqa: E402 (after the conftest's set-up)
from rollmill.engine.dit.gpu.qk_rope import qk_norm_rope, qkv_codes  # noqa: E402
from rollmill.engine.dit.gpu.streams import Streams  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
CASES = [(Streams(1, 2, 3), 2, 16), (Streams(2, 3, 4), 1, 24), (Streams(1, 130, 0), 1, 16), (Streams(1, 5, 0), 9, 16)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """float64 -> the nearest E4M3 value, ties to even, no larger than 448; smallest step 2^-9."""
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2.0**-6))) - 3)
    return ((x / step).round() * step).clamp(-448, 448)


def parts(qkv: torch.Tensor, streams: Streams, num_heads: int) -> tuple[torch.Tensor, ...]:
    """q, k, v [batch, tokens, num_heads, head_dim] of joint rows."""
    return qkv.view(streams.batch, streams.text + streams.image, 3, num_heads, -1).unbind(2)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def check_codes(streams: Streams, num_heads: int, head_dim: int) -> None:
    qkv = random(streams.num_rows, 3 * num_heads * head_dim)
    qkv[:, -head_dim:] *= torch.linspace(0, 9, len(qkv), device=DEVICE)[:, None]
    weights = [random(head_dim, seed=i) for i in range(2 if streams.image == 0 else 4)]
    angle = torch.rand(streams.text + streams.image, head_dim // 2, generator=torch.Generator().manual_seed(1)) * 6
    rotary = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    found = qkv_codes(qkv.clone(), weights, *rotary, streams, EPS)
    turned = qk_norm_rope(qkv.clone(), weights, *rotary, streams, EPS)
    scales = torch.stack([fp8_attention.norm_scale(weights[i::2]) for i in range(2)])
    expected = fp8_attention.quantize(*parts(turned, streams, num_heads), scales)
    for field in ("q", "k", "v", "qk_scales", "v_scales"):
        assert same_bits(getattr(found, field), getattr(expected, field)), field


@pytest.mark.parametrize(
    ("streams", "num_heads", "head_dim"), CASES, ids=["one sample", "two", "two tiles", "nine heads"]
)
def test_codes_are_those_of_what_bf16_attention_reads(streams: Streams, num_heads: int, head_dim: int):
    check_codes(streams, num_heads, head_dim)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a shape for a GPU: no CUDA device here")
@pytest.mark.parametrize("streams", [Streams(1, 512, 4096), Streams(3, 512, 1000)], ids=["FLUX.1", "three samples"])
def test_codes_of_real_shapes(streams: Streams):
    check_codes(streams, 24, 128)


def test_codes_are_the_nearest_and_scales_the_least():
    q, k, v = random(3, 2, 200, 2, 16).unbind(0)
    v[0, :128, 1] = 0
    scales = torch.tensor([0.03, 0.5], device=DEVICE)
    codes = fp8_attention.quantize(q, k, v, scales)
    for found, x, scale in ((codes.q, q, scales[0]), (codes.k, k, scales[1])):
        assert torch.equal(found.double(), e4m3((x.float() / scale).double()).transpose(1, 2))
    order = [16 * (place // 16) + fp8_attention.V_ORDER[place % 16] for place in range(256)]
    for head in range(2):
        whole = torch.cat([v[0, :, head], v.new_zeros(56, 16)]).float()
        for tile in range(2):
            part = whole[128 * tile : 128 * tile + 128]
            scale = (part.abs().max() / part.new_tensor(448)).clamp(
                min=2.0**-126
            )  # by a number CUDA multiplies its inverse
            assert codes.v_scales[0, head, tile] == scale
            places = [i for i in range(256) if 128 * tile <= order[i] < 128 * tile + 128]
            tokens = [order[i] - 128 * tile for i in places]
            assert torch.equal(codes.v[0, head][:, places].double(), e4m3((part / scale).double()).t()[:, tokens])


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float64, [batch, tokens, num_heads, head_dim]."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    s = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    return (torch.softmax(s, -1) @ v).transpose(1, 2)


def decoded(codes: fp8_attention.AttentionCodes, tokens: int) -> tuple[torch.Tensor, ...]:
    """q, k, v in float64 [batch, tokens, num_heads, head_dim]."""
    q, k = ((x.double() * s.double()).transpose(1, 2) for x, s in zip((codes.q, codes.k), codes.qk_scales, strict=True))
    order = [16 * (place // 16) + fp8_attention.V_ORDER[place % 16] for place in range(codes.v.shape[-1])]
    v = torch.empty_like(codes.v, dtype=torch.float64)
    v[..., order] = codes.v.double()
    v *= codes.v_scales.double().repeat_interleave(128, -1)[:, :, None]
    return q, k, v[..., :tokens].permute(0, 3, 1, 2)


def expected_of(codes: fp8_attention.AttentionCodes, tokens: int) -> torch.Tensor:
    """The definition in float64, tile after tile: the last one first."""
    q, k, v = (x.transpose(1, 2) for x in decoded(codes, tokens))
    s = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) * math.log2(math.e)
    out, total, so_far = torch.zeros_like(q), torch.zeros_like(s[..., :1]), torch.full_like(s[..., :1], -math.inf)
    tiles = codes.v_scales.shape[-1]
    for tile in [tiles - 1, *range(tiles - 1)]:
        part = slice(tile * 128, min(tile * 128 + 128, tokens))
        so_far = torch.maximum(so_far, s[..., part].amax(-1, keepdim=True))
        y = ((s[..., part] - so_far + 15 - 0.043) / 16).clamp(min=0).half().double()
        steps = (128 * y).round()
        octave, step = steps // 8, steps % 8
        p = torch.where(octave > 0, (8 + step) * 2.0 ** (octave - 10), step * 2.0**-9)  # what E4M3's bits stand for
        p *= (so_far - s.amax(-1, keepdim=True)).exp2()
        out, total = out + p @ v[:, :, part], total + p.sum(-1, keepdim=True)
    return (out / total).transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 16, 128, 300])
def test_the_definition_equals_float64(tokens: int):
    q, k, v = random(3, 2, tokens, 2, 32, seed=tokens).unbind(0)
    v *= torch.linspace(0.1, 4, tokens, device=DEVICE)[:, None, None]
    codes = fp8_attention.quantize(q, k, v, torch.tensor([0.02, 0.02], device=DEVICE))
    found = fp8_attention.attend(codes).double()
    expected = expected_of(codes, tokens)
    assert float((found - expected).norm() / expected.norm()) < 2e-3  # a probability at a border may be rounded away
    exact = softmax_attention(q, k, v)
    assert float((found - exact).norm() / exact.norm()) < 0.08


def test_a_tile_of_zeros_does_not_hide_small_values():
    q, k, v = random(3, 1, 256, 1, 16).unbind(0)
    v *= 1e-6
    v[:, :128] = 0
    codes = fp8_attention.quantize(q, k, v, torch.tensor([0.02, 0.02], device=DEVICE))
    found, exact = fp8_attention.attend(codes).double(), softmax_attention(q, k, v)
    assert float((found - exact).norm() / exact.norm()) < 0.08


def test_nothing_but_zeros_gives_zeros():
    q, k, v = random(3, 1, 20, 1, 16).unbind(0)
    codes = fp8_attention.quantize(q, k, v * 0, torch.tensor([0.02, 0.02], device=DEVICE))
    assert torch.equal(fp8_attention.attend(codes), torch.zeros(1, 20, 1, 16, device=DEVICE))


def test_samples_and_heads_do_not_notice_each_other():
    q, k, v = random(3, 3, 140, 2, 16).unbind(0)
    scales = torch.tensor([0.02, 0.02], device=DEVICE)
    together = fp8_attention.attend(fp8_attention.quantize(q, k, v, scales))
    for i in range(3):
        alone = fp8_attention.quantize(*(x[i : i + 1, :, 1:] for x in (q, k, v)), scales)
        assert torch.equal(fp8_attention.attend(alone)[0, :, 0], together[i, :, 1])


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="the kernel is for Hopper: no CUDA device here")
@pytest.mark.parametrize("tokens", [1, 63, 128, 129, 300, 1000, 4608])
def test_the_kernel_equals_the_definition(tokens: int):
    from rollmill.engine.dit.gpu.flash_fp8 import flash_fp8

    q, k, v = random(3, 2, tokens, 3, 128, seed=tokens).unbind(0)
    v *= torch.linspace(0.1, 4, tokens, device=DEVICE)[:, None, None]
    v[:, :, 1] *= 1e-3
    v[:, 128:256] = 0
    codes = fp8_attention.quantize(q * 2, k * 2, v, torch.tensor([0.03, 0.02], device=DEVICE))
    found = flash_fp8(codes).view(2, tokens, 3, 128)
    expected = fp8_attention.attend(codes)
    apart = (found.double() - expected.double()).norm(dim=(1, 3)) / expected.double().norm(dim=(1, 3))
    assert float(apart.max()) < 0.02  # of every sample and head; sums in the tensor cores have few bits
    assert torch.equal(flash_fp8(codes).view(2, tokens, 3, 128), found)
