"""The product for GPUs with NVFP4 tensor cores: all but its one scaled instruction, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import NVFP4

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.quant.gpu.nvfp4_native import native_matmul  # noqa: E402 (after the conftest's set-up)
from rollmill.quant.gpu.quantize import quantize_nvfp4  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("computes in the interpreter; no GPU with NVFP4 tensor cores was at hand", allow_module_level=True)


@pytest.mark.parametrize(("rows", "cols", "count"), [((33, 12), 272, 5), ((130,), 512, 3)], ids=["odd", "two tiles"])
def test_stored_tensors_multiply_as_in_float64(random_stored, ref, rows: tuple[int, ...], cols: int, count: int):
    scheme = NVFP4()
    stored = random_stored(scheme, rows, cols)
    x = torch.randn(count, cols, generator=torch.Generator().manual_seed(cols)).bfloat16()
    out = torch.full((count, sum(rows)), torch.nan).bfloat16()
    row_scale = ref.spread(stored["weight_scale_2"], rows).contiguous()
    native_matmul(*quantize_nvfp4(x), stored["weight"], stored["weight_scale"], row_scale, out)
    expected, mass = ref.linear(x, stored, rows, scheme)
    ulp = torch.exp2(torch.floor(torch.log2(expected.abs().clamp(min=2.0**-126))) - 7)
    assert bool(((out.double() - expected).abs() <= 2 * ulp + 1e-6 * mass).all())
