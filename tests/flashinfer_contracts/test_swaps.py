"""Hot swaps through every backend's `prepare`: equal bytes twice, addresses fixed, cold = hot."""

from __future__ import annotations

import pytest
import torch

from rollmill.moe import MoeConfig, RoutedExperts
from rollmill.quant import FP8, NVFP4, QuantLinear, UnsupportedError
from rollmill.weight_sync import Policy, SyncPlan

HIDDEN, INNER = 80, 48
EXPERTS = MoeConfig(num_experts=4, top_k=2, hidden_size=HIDDEN, intermediate_size=INNER)
LINEARS = [(kernel, "nvfp4_static") for kernel in ("trtllm", "cute_dsl", "cutlass", "cudnn", "auto")]
LINEARS += [("cute_dsl", "nvfp4"), ("auto", "nvfp4"), ("fp8", "fp8_static")]
RUNNERS = ["flashinfer_trtllm_routed", "flashinfer_trtllm"]
SCHEMES = {"nvfp4_static": NVFP4("static"), "nvfp4": NVFP4("per_token"), "fp8_static": FP8("static"), "fp8": FP8()}


def make_policy(layer) -> Policy:
    return Policy(SyncPlan(layer.slots))


@pytest.fixture
def linear(blackwell):
    def make(kernel, scheme):
        shards = ["o"] if kernel == "fp8" else ["q", "k"]
        return QuantLinear(
            shards, [72] * len(shards), HIDDEN, scheme, capability=blackwell, dtype=torch.bfloat16,
            kernel=f"flashinfer_{kernel}", bias=True,
        )  # fmt: skip

    return make


@pytest.fixture
def experts(blackwell):
    def make(runner, scheme):
        names = ("gate", "up", "down")
        return RoutedExperts(
            "experts", names, EXPERTS, scheme, capability=blackwell, dtype=torch.bfloat16, runner=runner
        )

    return make


def weights_for(policy, seed):
    """A trainer's BF16 tensors for every slot, and static scales."""
    generator = torch.Generator().manual_seed(seed)
    sent = {}
    for slot in policy.plan.slots:
        for unit in slot.modules:
            for module, rows in zip(unit, slot.shape.rows, strict=True):
                shape = (rows,) if slot.shape.cols is None else (rows, slot.shape.cols)
                name = f"{module}.{next(iter(slot.matrices))}"
                sent[name] = (torch.randn(shape, generator=generator) * 0.05).bfloat16()
                if "input_scale" in slot.scales:
                    sent[f"{module}.input_scale"] = torch.tensor(4.0 / slot.scheme.code_max)
    return sent


def bytes_of(policy):
    return {
        f"{slot.name}/{key}": tensor.view(torch.uint8).clone()
        for slot in policy.plan.slots
        for key, tensor in slot.tensors.items()
    }


def addresses(policy):
    return [tensor.data_ptr() for slot in policy.plan.slots for tensor in slot.tensors.values()]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def assert_swaps(make):
    cold, hot = make_policy(make()), make_policy(make())
    a, b = weights_for(hot, 1), weights_for(hot, 2)
    hot.update(a, "1")
    before, first = addresses(hot), bytes_of(hot)
    hot.update(b, "2")
    cold.update(b, "2")
    assert equal(bytes_of(hot), bytes_of(cold))
    assert not equal(bytes_of(hot), first)
    hot.update(dict(reversed(list(a.items()))), "3")
    assert equal(bytes_of(hot), first)
    assert addresses(hot) == before
    for slot in hot.plan.slots:  # `prepare` is pure
        if slot.shape.cols is not None:
            generator = torch.Generator().manual_seed(9)
            stored = slot.scheme.quantize(torch.randn(slot.shape.matrix, generator=generator).bfloat16(), slot.shape)
            once, twice = slot.packer.prepare(stored), slot.packer.prepare(stored)
            assert all(torch.equal(once[key].view(torch.uint8), twice[key].view(torch.uint8)) for key in once)


@pytest.mark.parametrize(("kernel", "scheme"), LINEARS)
def test_linears(kernel, scheme, linear):
    scheme = SCHEMES[scheme]
    try:
        linear(kernel, scheme)
    except UnsupportedError as refused:
        pytest.skip(refused.reasons[0])
    assert_swaps(lambda: linear(kernel, scheme))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_experts(runner, scheme, experts):
    try:
        experts(runner, scheme)
    except UnsupportedError as refused:
        pytest.skip(refused.reasons[0])
    assert_swaps(lambda: experts(runner, scheme))


def test_a_swap_that_the_kernel_cannot_hold_leaves_the_old_weights(linear):
    """A fused weight whose shards come with unequal global scales: refused before anything changes."""
    layer = linear("trtllm", NVFP4("static"))
    policy = make_policy(layer)
    policy.update(weights_for(policy, 1), "1")
    before = bytes_of(policy)
    foreign = {}
    for module, scale in (("q", 1.0), ("k", 1.5)):
        one = NVFP4("static")
        stored = one.quantize(torch.randn(72, HIDDEN).bfloat16(), layer.slot.shape.__class__((72,), HIDDEN))
        foreign |= {f"{module}.weight": stored["weight"], f"{module}.weight_scale": stored["weight_scale"]}
        foreign[f"{module}.weight_scale_2"] = torch.tensor(scale / 1000)
    with pytest.raises(UnsupportedError, match="one weight_scale_2"):
        policy.update({**weights_for(policy, 1), **foreign}, "2")
    assert policy.version == "1"
    assert equal(bytes_of(policy), before)
