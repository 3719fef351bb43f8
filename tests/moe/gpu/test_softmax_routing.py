"""The softmax router's kernel against the torch router, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from rollmill.moe import MoeConfig, route

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.moe.gpu.routing import route_softmax  # noqa: E402 (after the conftest's set-up)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # keys of 64 and of 32 bits


def random(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens + experts)
    return (torch.randn(tokens, experts, generator=generator) * 2).to(dtype)


def expected(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU, where `route` is plain torch."""
    return route(logits.cpu(), MoeConfig(logits.shape[1], top_k, 8, 8, renormalize=renormalize))


def call(logits: torch.Tensor, *asked) -> tuple[torch.Tensor, torch.Tensor]:
    ids, weights = route_softmax(logits.to(DEVICE), *asked)
    return ids.cpu(), weights.cpu()


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "as is"])
@pytest.mark.parametrize(
    ("experts", "top_k"), [(4, 1), (8, 2), (60, 4), (128, 8), (512, 10), (16, 16)], ids=lambda size: str(size)
)
def test_routes_as_torch(experts: int, top_k: int, renormalize: bool):
    logits = random(6, experts)
    ids, weights = call(logits, top_k, renormalize)
    expected_ids, expected_weights = expected(logits, top_k, renormalize)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-6)


def test_bf16_logits_have_ties_and_the_lower_id_is_first():
    logits = random(40, 128, torch.bfloat16)
    ids, weights = call(logits, 8, True)
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :8]
    assert torch.equal(ids, order)
    torch.testing.assert_close(weights, expected(logits, 8, True)[1], rtol=1e-6, atol=1e-6)
    assert bool((logits.gather(1, ids)[:, 1:] == logits.gather(1, ids)[:, :-1]).any()), "no tie was tested"


@dtypes
def test_zeros_of_both_signs_are_equal(dtype: torch.dtype):
    ids, weights = call(torch.tensor([[-0.0, 0.0, -0.0, 0.0]], dtype=dtype), 3, True)
    assert ids.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))


@dtypes
def test_far_apart_and_infinitely_low_logits(dtype: torch.dtype):
    logits = torch.tensor([[300.0, -300.0, float("-inf"), 0.0], [-3e38, 3e38, 0.0, -1.0]], dtype=dtype)
    ids, weights = call(logits, 4, False)
    assert ids.tolist() == [[0, 3, 1, 2], [1, 2, 3, 0]]
    assert weights.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_ids_are_distinct_experts_whatever_the_logits(bad: float, dtype: torch.dtype):
    for logits in (torch.full((1, 6), bad, dtype=dtype), torch.tensor([[1.0, bad, 2.0, bad, bad, 0.0]], dtype=dtype)):
        (ids,) = call(logits, 4, True)[0].tolist()
        assert len(set(ids)) == 4
        assert set(ids) <= set(range(6))


def test_scaling_multiplies_the_weights():
    logits = random(3, 16)
    assert torch.equal(call(logits, 4, True, 2.5)[1], call(logits, 4, True)[1] * 2.5)


def test_a_token_does_not_depend_on_the_others():
    logits = random(7, 60)
    whole, alone = call(logits, 4, True), call(logits[3:4], 4, True)
    assert all(torch.equal(a[3:4], b) for a, b in zip(whole, alone, strict=True))


def test_no_tokens():
    assert call(random(0, 16), 4, True)[0].shape == (0, 4)


@pytest.mark.gpu
def test_route_takes_the_kernel_on_a_gpu():
    if DEVICE == "cpu":
        pytest.skip("torch sees no GPU")
    logits, config = random(300, 128, torch.bfloat16).cuda(), MoeConfig(128, 8, 8, 8, routed_scaling_factor=1.5)
    found, kernel = route(logits, config), route_softmax(logits, 8, True, 1.5)
    assert all(torch.equal(a, b) for a, b in zip(found, kernel, strict=True))
