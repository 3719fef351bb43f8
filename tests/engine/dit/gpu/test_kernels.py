"""Kernels between the linears against float64, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.dit.gpu.activations import Activations  # noqa: E402 (after the conftest's set-up)
from rollmill.engine.dit.gpu.gelu import gelu, join_gelu, tiles  # noqa: E402
from rollmill.engine.dit.gpu.modulate import add_gated, norm_modulate  # noqa: E402
from rollmill.engine.dit.gpu.qk_rope import qk_norm_rope  # noqa: E402
from rollmill.engine.dit.gpu.streams import Streams  # noqa: E402
from rollmill.quant.gpu.quantize import quantize_fp8  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
ULP = 2.0**-8  # of BF16: half a step
STREAMS = [Streams(1, 2, 3), Streams(3, 2, 5), Streams(2, 5, 1), Streams(3, 4, 0)]
streams_of_all_kinds = pytest.mark.parametrize(
    "streams", STREAMS, ids=["one sample", "three", "more text", "one stream"]
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)


def table(streams: Streams, cols: int, parts: int) -> tuple[torch.Tensor, ...]:
    """Modulations as one linear gives them: [num_streams, batch, parts * cols], in `parts` parts."""
    return random(1 if streams.image == 0 else 2, streams.batch, parts * cols, seed=parts).chunk(parts, dim=-1)


def spread(modulation: torch.Tensor, streams: Streams) -> torch.Tensor:
    """float64 [num_rows, K]: the modulation of every row."""
    counts = (streams.text, streams.image)
    return torch.cat([one.double().repeat_interleave(n, 0) for one, n in zip(modulation, counts, strict=False)])


def joint_order(streams: Streams) -> list[int]:
    """For every joint row the row of the streams."""
    text, image, count = streams.text, streams.image, streams.text_rows
    order = []
    for i in range(streams.batch):
        order += [*range(i * text, (i + 1) * text), *range(count + i * image, count + (i + 1) * image)]
    return order


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@streams_of_all_kinds
@pytest.mark.parametrize("cols", [16, 96])
@pytest.mark.parametrize("added", [False, True], ids=["norm", "residual and norm"])
def test_modulation_equals_float64(streams: Streams, cols: int, added: bool):
    x, y = random(streams.num_rows, cols) * 2 + 1, random(streams.num_rows, cols, seed=5)
    scale, shift, gate = table(streams, cols, 3)
    h = x.double() + (spread(gate, streams) * y.double() if added else 0)
    changed = x.clone()
    found = norm_modulate(changed, scale, shift, streams, EPS, (y, gate) if added else None)
    assert bool(((changed.double() - h).abs() <= h.abs() * ULP + 1e-6).all())
    h = changed.double()  # as it was rounded
    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    expected = normed * (1 + spread(scale, streams)) + spread(shift, streams)
    assert found.rows is not None
    assert bool(((found.rows.double() - expected).abs() <= expected.abs() * ULP + 1e-5).all())


@streams_of_all_kinds
def test_modulation_gives_the_codes_of_its_rows(streams: Streams):
    x, (scale, shift) = random(streams.num_rows, 96), table(streams, 96, 2)
    both = norm_modulate(x.clone(), scale, shift, streams, EPS, keep=True, quantize=True)
    codes = norm_modulate(x.clone(), scale, shift, streams, EPS, keep=False, quantize=True)
    expected, token = quantize_fp8(both.rows)
    assert codes.rows is None
    for found in (both, codes):
        assert same_bits(found.codes, expected)
        assert same_bits(found.scale, token)


@streams_of_all_kinds
def test_residual_alone(streams: Streams):
    x, y, (gate,) = random(streams.num_rows, 48), random(streams.num_rows, 48, seed=5), table(streams, 48, 1)
    expected = x.double() + spread(gate, streams) * y.double()
    add_gated(x, y, gate, streams)
    assert bool(((x.double() - expected).abs() <= expected.abs() * ULP + 1e-6).all())


def launch(attention: torch.Tensor | None, mlp: torch.Tensor | None, streams: Streams, *, keep: bool) -> Activations:
    if attention is not None:
        return join_gelu(attention, mlp, streams, keep=keep, quantize=True)
    assert mlp is not None
    return gelu(mlp, streams, keep=keep, quantize=True)


@pytest.mark.parametrize("inner", [0, 1, 16, 48, 80, 96, 100, 4096, 10240, 12288, 13000])
def test_tiles_cover_a_row(inner: int):
    _, first, second = tiles(0, inner)
    assert inner <= first + second <= 2 * inner
    assert all(size & (size - 1) == 0 for size in (first, second))
    assert second == 0 or inner > first  # the first tile needs no mask then
    assert (first, second) == (8192, 4096) or inner != 12288


@streams_of_all_kinds
@pytest.mark.parametrize(("width", "inner"), [(16, 64), (48, 96), (48, 0), (0, 80)])
def test_gelu_beside_attention_equals_float64(streams: Streams, width: int, inner: int):
    attention = random(streams.num_rows, width) if width else None
    mlp = random(streams.num_rows, inner, seed=1) * 3 if inner else None
    parts = []
    if attention is not None:
        rows = torch.empty_like(attention)
        rows[joint_order(streams)] = attention  # what attention gives is joint
        parts.append(rows.double())
    if mlp is not None:
        parts.append(torch.nn.functional.gelu(mlp.double(), approximate="tanh"))
    expected = torch.cat(parts, -1)
    both = launch(attention, mlp, streams, keep=True)
    codes, token = quantize_fp8(both.rows)
    assert bool(((both.rows.double() - expected).abs() <= expected.abs() * ULP + 2e-6).all())
    alone = launch(attention, mlp, streams, keep=False)
    for found in (both, alone):
        assert same_bits(found.codes, codes)
        assert same_bits(found.scale, token)


@pytest.mark.parametrize("value", [-3e38, -200.0, -0.0, 0.0, 200.0, 3e38])
def test_gelu_of_large_numbers_is_theirs_or_zero(value: float):
    mlp = torch.full((3, 16), value).bfloat16().to(DEVICE)
    found = gelu(mlp, Streams(1, 3, 0)).rows
    assert torch.equal(found, mlp.clamp(min=0))


@streams_of_all_kinds
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 16), (3, 8), (2, 24)])
def test_norm_and_rotation_equal_float64_and_diffusers(streams: Streams, num_heads: int, head_dim: int):
    sequence = streams.text + streams.image
    qkv = random(streams.num_rows, 3 * num_heads * head_dim)
    weights = [random(head_dim, seed=i) for i in range(2 if streams.image == 0 else 4)]
    angle = torch.rand(sequence, head_dim // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6
    found = qk_norm_rope(qkv.clone(), weights, angle.cos(), angle.sin(), streams, EPS)
    order = joint_order(streams)
    q, k, v = qkv[order].view(streams.batch, sequence, 3, num_heads, head_dim).unbind(2)
    is_text = torch.arange(sequence, device=DEVICE) < streams.text
    expected = []
    for i, part in enumerate((q, k)):
        both = [weights[i], weights[-2:][i]]
        weight = torch.where(is_text[:, None], both[0].double(), both[1].double())[None, :, None]
        wide = part.double() / (part.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        tables = (angle.cos().repeat_interleave(2, 1), angle.sin().repeat_interleave(2, 1))
        expected.append(apply_rotary_emb(wide.float(), tables, sequence_dim=1).double())
    got = found.view(streams.batch, sequence, 3, num_heads, head_dim)
    assert same_bits(got[:, :, 2], v)
    for i in range(2):
        size = expected[i].unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, -1, -1, 2).flatten(-2)
        assert bool(((got[:, :, i].double() - expected[i]).abs() <= size * 3 * ULP).all())


def test_streams_join_as_the_kernels_place_rows():
    streams = Streams(3, 2, 5)
    rows = random(streams.num_rows, 4)
    assert torch.equal(streams.join(rows), rows[joint_order(streams)])
