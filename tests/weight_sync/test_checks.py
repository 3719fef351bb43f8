"""What is finite: one look at many tensors says what a look at each would."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import UnsupportedError, find_capability
from rollmill.weight_sync import NonFiniteError
from rollmill.weight_sync.checks import FiniteChecks, are_finite, is_finite


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    try:
        find_capability(request.param)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return request.param


def candidates(device):
    plain = [torch.zeros(0), torch.full((3, 70), 3.4e38), torch.tensor(-1.0), torch.ones(70_000).bfloat16()]
    plain += [torch.full((5,), 0x7F, dtype=torch.uint8), torch.full((9,), -448.0).to(torch.float8_e4m3fn)]
    broken = []
    for value in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for size, at in ((1, 0), (9, 4), (70_000, 69_999), (70_000, 0)):
                broken.append(torch.ones(size, dtype=dtype))
                broken[-1][at] = value
    codes = torch.full((3, 9), 0x3C, dtype=torch.uint8)
    codes[2, 8] = 0xFF
    broken.append(codes.view(torch.float8_e4m3fn))
    return [t.to(device) for t in plain], [t.to(device) for t in broken]


def test_one_look_at_many(device):
    finite, broken = candidates(device)
    mixed = [t for pair in zip(finite * 7, broken, strict=False) for t in pair]
    assert are_finite(mixed) == [is_finite(t) for t in mixed] == [True, False] * (len(mixed) // 2)
    assert are_finite(finite) == [True] * len(finite)
    assert are_finite(broken) == [False] * len(broken)
    assert are_finite([]) == []


def test_the_broken_one_is_named_and_the_rest_let_go():
    freed, checks = [], FiniteChecks(limit=100)
    good, bad = torch.ones(4), torch.tensor([1.0, torch.nan])
    checks.add([good], [("good", good)], 8, lambda: freed.append("good"))
    assert freed == []
    checks.add([good], [("large", good)], 101, lambda: freed.append("large"))  # beyond the limit: looked at
    assert freed == ["good", "large"]
    checks.add([good, bad], [("fine", good), ("broken", bad)], 8, lambda: freed.append("never"))
    with pytest.raises(NonFiniteError, match="broken holds NaN"):
        checks.look()
    checks.look()
    assert freed == ["good", "large"]
