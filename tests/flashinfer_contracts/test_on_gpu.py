"""What of FlashInfer runs on the GPU that is here: its layouts are ours, its FP8 products agree, its gaps are known."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import FP8, NVFP4, UnsupportedError, WeightShape, find_capability, layout
from rollmill.quant.flashinfer_api.activation import quantize_nvfp4
from rollmill.quant.flashinfer_api.library import import_flashinfer
from rollmill.quant.kernels.activation import quantize_activation
from rollmill.quant.kernels.flashinfer_fp8 import FlashInferFP8
from rollmill.quant.kernels.reference import ReferenceKernel

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    """The GPU with its FlashInfer."""
    try:
        capability = find_capability("cuda")
    except UnsupportedError as refused:
        pytest.skip(str(refused))
    reason = FlashInferFP8.unsupported(FP8("static"), WeightShape((16,), 16), torch.bfloat16, capability)
    if reason is not None:
        pytest.skip(reason)
    return capability


@pytest.mark.parametrize(("rows", "cols"), [(128, 4), (256, 12), (1536, 128), (2048, 48)])
def test_scale_orders_equal_ours(rows, cols, gpu):
    flashinfer = import_flashinfer()
    scales = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, device=gpu.device)
    ours = layout.swizzle_scales(scales)
    assert torch.equal(flashinfer.block_scale_interleave(scales).view(ours.shape), ours)
    shuffled = layout.swizzle_scales(layout.gather_rows(scales, layout.shuffle_rows_index(rows, 128)))
    assert torch.equal(flashinfer.shuffle_matrix_sf_a(scales, 128).view(shuffled.shape), shuffled)
    assert torch.equal(
        flashinfer.shuffle_matrix_a(scales, 128), layout.gather_rows(scales, layout.shuffle_rows_index(rows, 128))
    )


@pytest.mark.parametrize("encode", [None, 1.0], ids=["per_token", "static"])
def test_nvfp4_quantizers(encode, gpu):
    """Below sm100 they are refused, for what they return there is not the quantized input; from there on they equal
    the reference."""
    x = torch.randn(64, 256, device=gpu.device).bfloat16()
    scale = None if encode is None else torch.tensor([encode], device=gpu.device)
    scheme = NVFP4("per_token" if encode is None else "static")
    if gpu.sm >= 100:
        expected = quantize_activation(x, scheme, scale, torch.float32)[0]
        codes, scales, _ = quantize_nvfp4(x, scale, "linear", gpu)
        stored = {"weight": codes, "weight_scale": scales.view(torch.float8_e4m3fn).reshape(64, 16)}
        one = torch.ones(1, device=gpu.device)
        found = scheme.dequantize({**stored, "weight_scale_2": one}, WeightShape((64,), 256))
        assert torch.equal(found, expected)
        return
    with pytest.raises(UnsupportedError, match="what lay in memory"):
        quantize_nvfp4(x, scale, "linear", gpu)


@pytest.mark.parametrize("activation", ["static", "per_tensor"])
@pytest.mark.parametrize("shape", [WeightShape((512,), 1024), WeightShape((200,), 72)], ids=["aligned", "padded"])
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_fp8_products_agree(activation, shape, tokens, gpu):
    scheme = FP8(activation)
    kernel = FlashInferFP8(scheme, shape, torch.bfloat16, gpu)
    stored = scheme.quantize((torch.randn(shape.matrix, device=gpu.device) * 0.05).bfloat16(), shape)
    x = torch.randn(tokens, shape.cols, device=gpu.device).bfloat16()
    if activation == "static":
        stored["input_scale"] = (x.abs().amax().float() / 448).view(1)
    packed = kernel.prepare(stored) | kernel.derive(stored)
    bias = torch.randn(shape.num_rows, device=gpu.device).bfloat16()
    expected = ReferenceKernel(scheme, shape, torch.float32, gpu).apply(x, stored, bias)
    out = kernel.apply(x, packed, bias).float()
    # FP8 tensor cores keep 14 bits of a sum; one BF16 rounding of the product, one with the bias
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()) / 4)
