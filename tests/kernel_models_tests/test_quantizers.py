"""The quantizers through FlashInfer's functions: shapes, dtypes, layouts, and values against a brute-force search."""

from __future__ import annotations

import pytest
import torch
from kernel_models import decoding, quantizers
from kernel_models.library import ModelLibrary

flashinfer = pytest.importorskip("flashinfer", reason="flashinfer is not installed")
from flashinfer.tllm_enums import SfLayout  # noqa: E402

SCALE_INV = 1.0 / 2688
LAYOUTS: dict[int, decoding.Layout] = {0: "128x4", 1: "8x4", 2: "linear"}


def test_e2m1_is_the_nearest_value_and_ties_go_to_even_codes() -> None:
    x = torch.cat([torch.linspace(-8, 8, 4001), quantizers.MIDPOINTS, -quantizers.MIDPOINTS])
    codes = quantizers.encode_e2m1(x)
    values = decoding.E2M1[codes.long()]
    distance = (x[:, None].clamp(-6, 6) - decoding.E2M1[None]).abs()
    assert torch.equal((x.clamp(-6, 6) - values).abs(), distance.min(dim=1).values)
    assert not (codes[4001:] & 1).any()
    assert torch.equal(codes >> 3, torch.signbit(x).to(torch.uint8))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(SfLayout.layout_128x4, (128, 8)), (SfLayout.layout_8x4, (24, 8)), (SfLayout.layout_linear, (20, 5))],
)
@pytest.mark.parametrize("per_token", [False, True])
def test_layouts_shapes_and_padding(
    model_library: ModelLibrary, layout: SfLayout, shape: tuple[int, int], per_token: bool
) -> None:
    x = torch.randn(20, 80).bfloat16()
    scale = SCALE_INV if per_token else (2688 / x.float().abs().amax()).view(1)
    codes, scales, *rest = flashinfer.nvfp4_quantize(x, scale, sfLayout=layout, per_token_activation=per_token)
    assert codes.shape == (20, 40)
    assert codes.dtype == scales.dtype == torch.uint8
    assert scales.shape == shape
    decode = rest[0][:, None] if per_token else 1 / scale
    name = LAYOUTS[int(layout)]
    error = decoding.decode_nvfp4(codes, scales, name) * decode - x.float()
    assert error.norm() / x.float().norm() < 0.12
    read = decoding.read_scales(scales, 20, 5, name)
    assert int(scales.long().sum()) == int(read.long().sum())


def test_the_largest_block_of_a_row_has_the_largest_scale(model_library: ModelLibrary) -> None:
    x = torch.randn(16, 128).bfloat16() * torch.logspace(-6, 6, 16)[:, None].bfloat16()
    codes, scales, per_token = flashinfer.nvfp4_quantize(
        x, SCALE_INV, sfLayout=SfLayout.layout_linear, per_token_activation=True
    )
    assert per_token.shape == (16,)
    assert per_token.dtype == torch.float32
    assert (scales.view(torch.float8_e4m3fn).float().amax(dim=1) == 448).all()
    torch.testing.assert_close(per_token, x.float().abs().amax(dim=1) / 2688, rtol=1e-6, atol=0)
    assert codes.float().sum() > 0


def test_rows_and_blocks_of_zeros(model_library: ModelLibrary) -> None:
    x = torch.randn(3, 64).bfloat16()
    x[1] = 0
    x[2, 16:32] = 0
    codes, scales, per_token = flashinfer.nvfp4_quantize(
        x, SCALE_INV, sfLayout=SfLayout.layout_linear, per_token_activation=True
    )
    assert not codes[1].any()
    assert not scales[1].any()
    assert per_token[1] == 1 / torch.tensor(torch.finfo(torch.float32).max)
    assert not codes[2, 8:16].any()
    assert scales[2, 1] == 0


def test_a_row_does_not_depend_on_its_neighbours(model_library: ModelLibrary) -> None:
    x = torch.randn(8, 64).bfloat16()
    together = flashinfer.nvfp4_quantize(x, SCALE_INV, sfLayout=SfLayout.layout_linear, per_token_activation=True)
    alone = flashinfer.nvfp4_quantize(x[5:6], SCALE_INV, sfLayout=SfLayout.layout_linear, per_token_activation=True)
    for whole, one in zip(together, alone, strict=True):
        assert torch.equal(whole[5:6], one)


def test_a_shuffled_weight_is_rows_and_scales_shuffled_alike(model_library: ModelLibrary) -> None:
    x = torch.randn(256, 64).bfloat16()
    scale = torch.ones(1)
    codes, scales = flashinfer.nvfp4_quantize(x, scale, do_shuffle=True)
    plain, linear = flashinfer.nvfp4_quantize(x, scale, sfLayout=SfLayout.layout_linear)
    expected = decoding.decode_nvfp4(plain, linear, "linear")
    assert torch.equal(decoding.unshuffle_rows(decoding.decode_nvfp4(codes, scales, "128x4")), expected)


def test_interleaving_experts_pads_each_alone(model_library: ModelLibrary) -> None:
    scales = torch.randint(0, 127, (3, 20, 6), dtype=torch.uint8)
    swizzled = flashinfer.block_scale_interleave(scales)
    assert swizzled.shape == (3 * 128 * 8,)
    for expert in range(3):
        part = swizzled[expert * 1024 : (expert + 1) * 1024]
        assert torch.equal(decoding.read_scales(part, 20, 6, "128x4"), scales[expert])


def test_fp8_rows() -> None:
    x = torch.randn(4, 32).bfloat16()
    x[1] = 0
    values, scale = quantizers.quantize_fp8_per_token(x)
    assert scale.shape == (4, 1)
    torch.testing.assert_close(values * scale, x.float(), rtol=0.07, atol=1e-3)
    assert values[0].abs().max() == 448


def test_below_blackwell_the_kernels_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    ModelLibrary(sm=90).install(monkeypatch)
    with pytest.raises(ValueError, match="sm100"):
        flashinfer.nvfp4_quantize(torch.randn(4, 64).bfloat16(), SCALE_INV, per_token_activation=True)


def test_cpu_tensors_move_nowhere_outside_a_call(model_library: ModelLibrary) -> None:
    flashinfer.nvfp4_quantize(torch.randn(4, 64).bfloat16(), torch.ones(1))
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.ones(1).cuda()
