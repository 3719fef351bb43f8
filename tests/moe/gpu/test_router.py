"""The router's kernel for few tokens against float64, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from rollmill.moe import router_logits

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.moe.gpu import router  # noqa: E402 (after the conftest's set-up)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 8, 512), (7, 60, 200), (17, 5, 1040), (3, 1, 16)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return router.multiply_router(x.to(DEVICE), weight.to(DEVICE)).cpu()


@pytest.mark.parametrize(("tokens", "experts", "cols"), SIZES, ids=str)
def test_logits_equal_float64(tokens: int, experts: int, cols: int, monkeypatch: pytest.MonkeyPatch):
    """Poisoned outputs; within half a step of BF16, and what float32 sums may lose."""
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: make(*args, **kw).fill_(torch.nan))
    x, weight = random(tokens, cols), random(experts, cols)
    expected, mass = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    ulp = torch.exp2(torch.floor(torch.log2(expected.abs().clamp(min=2.0**-126))) - 7)
    assert ((call(x, weight).double() - expected).abs() <= 0.5 * ulp + 1e-6 * mass).all()


def test_a_token_is_bit_equal_in_any_company():
    x, weight = random(33, 200), random(24, 200)
    whole = call(x, weight)
    assert torch.equal(call(x[20:21], weight), whole[20:21])
    assert torch.equal(call(x[5:12], weight), whole[5:12])


def test_no_tokens():
    assert call(random(0, 64), random(8, 64)).shape == (0, 8)


def test_many_tokens_float32_and_biases_are_torchs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rollmill.moe.routing.has_kernels", lambda x: True)
    monkeypatch.setattr(router, "multiply_router", lambda x, weight: None)
    x, weight, bias = random(65, 16).to(DEVICE), random(8, 16).to(DEVICE), random(8).to(DEVICE)
    assert router_logits(x[:64], weight) is None
    for logits in (
        router_logits(x, weight),
        router_logits(x[:1].float(), weight.float()),
        router_logits(x[:1], weight, bias),
    ):
        assert logits is not None
