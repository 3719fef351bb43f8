"""Products whose rows do not depend on their number."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant.kernels.gemm import matmul, matmul_float32, padded_rows

SIZES = (1, 2, 3, 7, 16, 17, 33, 64, 100, 255, 256, 257, 300)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cols", "rows"), [(64, 96), (576, 960), (1536, 576), (1000, 33)], ids=str)
def test_a_row_does_not_depend_on_its_company(cols, rows, threads):
    torch.manual_seed(0)
    weight, x = torch.randn(rows, cols), torch.randn(300, cols).bfloat16()
    threads(1)
    expected = matmul_float32(x, weight)
    exact = x.double() @ weight.double().T
    assert (expected - exact).abs().max() < 1e-5 * (x.double().abs() @ weight.double().abs().T).max()
    for count in (1, 2):
        threads(count)
        for size in SIZES:
            assert torch.equal(matmul_float32(x[:size], weight), expected[:size]), (count, size)
            assert torch.equal(matmul_float32(x[300 - size :], weight), expected[300 - size :]), (count, size)


def test_few_sizes_hold_all_rows_with_little_waste():
    sizes = {padded_rows(rows) for rows in range(2049)}
    assert len(sizes) <= 40  # a kernel is compiled and kept for each
    for rows in range(1, 2049):
        assert rows <= padded_rows(rows) <= max(2, 2 * rows)
        assert rows <= 256 or padded_rows(rows) - rows < 128


def test_no_rows_give_no_rows():
    assert matmul_float32(torch.empty(0, 64), torch.randn(32, 64)).shape == (0, 32)


def test_the_bias_is_added_before_rounding():
    x, weight = torch.ones(1, 1).bfloat16(), torch.tensor([[1 + 3 * 2.0**-9]])
    out = matmul(x, weight, torch.tensor([-(2.0**-9)]))
    assert out.dtype == torch.bfloat16
    assert out.item() == 1.0  # 1 + 2^-8, a tie; the product rounded by itself would be 1 + 2^-7, and stay there
