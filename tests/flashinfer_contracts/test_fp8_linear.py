"""FP8 through `bmm_fp8`."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import FP8, UnsupportedError, WeightShape, select_kernel
from rollmill.quant.kernels.flashinfer_fp8 import FlashInferFP8
from rollmill.quant.kernels.reference import ReferenceKernel


@pytest.mark.parametrize("activation", ["static", "per_tensor"])
@pytest.mark.parametrize("shape", [WeightShape((64,), 128), WeightShape((24,), 40)], ids=["aligned", "padded"])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_output(activation, shape, tokens, blackwell, stored_weight):
    scheme = FP8(activation)
    made = select_kernel(scheme, shape, blackwell, torch.bfloat16, "flashinfer_fp8")(
        scheme, shape, torch.bfloat16, blackwell
    )
    stored = stored_weight(scheme, shape)
    packed = made.prepare(stored) | made.derive(stored)
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.items()} == {
        k: (spec.shape, spec.dtype) for k, spec in made.packed().items()
    }
    x = torch.randn(tokens, shape.cols).bfloat16()
    expected = ReferenceKernel(scheme, shape, torch.float32, blackwell).apply(x, stored)
    out = made.apply(x, packed).float()
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=2**-8, atol=2e-4)


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        (FP8("per_token"), WeightShape((64,), 128), "one scale for all tokens"),
        (FP8("static", per_channel=True), WeightShape((64,), 128), "one scale a weight"),
        (FP8("static"), WeightShape((32, 32), 128), "fused shards"),
    ],
    ids=["per_token", "per_channel", "fused"],
)
def test_reasons(scheme, shape, words, blackwell):
    assert words in FlashInferFP8.unsupported(scheme, shape, torch.bfloat16, blackwell)
    with pytest.raises(UnsupportedError, match="flashinfer_fp8"):
        select_kernel(scheme, shape, blackwell, torch.bfloat16, "flashinfer_fp8")
