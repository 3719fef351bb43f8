"""A GPU computes and tells later what was not finite: by then the sender's memory is the sender's again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from rollmill.moe import MoeConfig, RoutedExperts
from rollmill.quant import QuantLinear, find_capability, make_scheme
from rollmill.weight_sync import NonFiniteError, Policy, SyncPlan

CPU = find_capability("cpu")
EIGHT = MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32)
SHAPES = {"experts.gate_up_proj": (8, 64, 64), "experts.down_proj": (8, 64, 32), "o_proj.weight": (64, 64)}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """The order of a GPU; what it computes a CPU computes at once."""
    for module in ("staging", "pending", "assembly"):
        monkeypatch.setattr(f"rollmill.weight_sync.{module}.has_kernels", lambda x: True)


@pytest.fixture(params=["bf16", "fp8_channel", "fp8", "nvfp4_w4a16"])
def scheme(request):
    return make_scheme(request.param)


@pytest.fixture(params=["staged", "host", "streamed"])
def mode(request):
    return request.param


def make_policy(scheme, mode="staged"):
    common = {"capability": CPU, "dtype": torch.bfloat16}
    slots = RoutedExperts("experts", ("gate", "up", "down"), EIGHT, scheme, **common).slots
    return Policy(SyncPlan([*slots, *QuantLinear(["o_proj"], [64], 64, scheme, **common).slots]), mode)


def make_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for name, shape in SHAPES.items()}


def in_one_buffer(weights):
    """Bucket by bucket, in memory that is overwritten once a bucket has been taken."""
    buffer = torch.empty(max(w.numel() for w in weights.values()), dtype=torch.bfloat16)
    for name, weight in weights.items():
        view = buffer[: weight.numel()].view(weight.shape)
        view.copy_(weight)
        yield [(name, view)]
        buffer.fill_(7)


def swap(policy, weights, version):
    with policy.begin(version) as session:
        for bucket in in_one_buffer(weights):
            session.load(bucket)


def bytes_of(policy):
    return [t.view(torch.uint8).numpy().tobytes() for slot in policy.plan.slots for t in slot.tensors.values()]


def test_a_buffer_used_again_gives_the_same_bytes(scheme, mode):
    policy, expected = make_policy(scheme, mode), make_policy(scheme)
    for seed in (1, 2):
        swap(policy, make_weights(seed), str(seed))
    expected.update(make_weights(2), "2")
    assert policy.digest() == expected.digest()
    assert bytes_of(policy) == bytes_of(expected)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mode", ["staged", "host"])
def test_what_was_not_finite_is_named_after_it_was_overwritten(scheme, mode, name):
    """Infinity: of NaN only a GPU's quantizers tell by their scales."""
    policy, broken = make_policy(scheme, mode), make_weights(2)
    swap(policy, make_weights(1), "1")
    served = bytes_of(policy)
    broken[name].view(-1)[-3] = torch.inf
    with pytest.raises(NonFiniteError, match=name):
        swap(policy, broken, "2")
    assert (policy.version, bytes_of(policy)) == ("1", served)
    policy.check_servable()


def test_a_stack_is_let_go_once_it_is_loaded(scheme):
    policy, weights = make_policy(scheme), make_weights(1)
    with policy.begin("1") as session:
        for name, weight in weights.items():
            owner = weight.view(torch.int16).numpy().copy()
            alive = weakref.ref(owner)
            session.load([(name, torch.from_numpy(owner).view(torch.bfloat16))])
            del owner
            gc.collect()
            assert alive() is None, name
