"""A policy with every kind of slot, and the weights that a trainer would send it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from rollmill.moe import MoeConfig, RoutedExperts
from rollmill.quant import BF16, QuantLinear, Scheme, find_capability, make_scheme, plain_slot
from rollmill.weight_sync import Policy, SyncPlan

CPU = find_capability("cpu")
EXPERTS = MoeConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=48)
LINEARS = {  # name of the fused weight -> shards, rows, in_features
    "qkv_proj": (("q_proj", "k_proj", "v_proj"), (96, 32, 32), 64),
    "gate_up_proj": (("gate_proj", "up_proj"), (80, 80), 64),
    "odd_proj": (("odd_proj",), (1000,), 1040),
}
SCHEMES = {
    "bf16": BF16,
    "fp8-static": make_scheme("fp8", "static"),
    "fp8-per_token": make_scheme("fp8"),
    "fp8_channel": make_scheme("fp8_channel"),
    "nvfp4-static": make_scheme("nvfp4", "static"),
    "nvfp4-per_token": make_scheme("nvfp4"),
    "nvfp4_w4a16": make_scheme("nvfp4_w4a16"),
}
Weights = dict[str, Tensor]
MakePolicy = Callable[..., Policy]


@pytest.fixture(params=SCHEMES, ids=SCHEMES.keys())
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return SCHEMES[request.param]


@pytest.fixture
def make_policy() -> MakePolicy:
    def make(scheme: Scheme, mode: str = "staged", kernel: str = "auto", master: str | None = None) -> Policy:
        common = {"capability": CPU, "dtype": torch.bfloat16}
        slots = [plain_slot(["norm"], [64], None, BF16, CPU, torch.bfloat16)]
        for fused, (shards, rows, cols) in LINEARS.items():
            joined = fused if len(shards) > 1 else None
            bias = fused == "qkv_proj"
            slots += QuantLinear(shards, rows, cols, scheme, kernel=kernel, fused=joined, bias=bias, **common).slots
        names = ("gate_proj", "up_proj", "down_proj")
        slots += RoutedExperts("experts", names, EXPERTS, scheme, linear_kernel=kernel, **common).slots
        return Policy(SyncPlan(slots), mode, master)

    return make


def make_weights(seed: int) -> Weights:
    """BF16 weights in checkpoint names: per-expert 2-D tensors, shards apart. Shards differ in amplitude."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.05) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).bfloat16()

    weights = {"norm.weight": normal(64)}
    for shards, rows, cols in LINEARS.values():
        for index, (shard, count) in enumerate(zip(shards, rows, strict=True)):
            weights[f"{shard}.weight"] = normal(count, cols, std=0.05 * 2**index)
    for shard, count in zip(*LINEARS["qkv_proj"][:2], strict=True):
        weights[f"{shard}.bias"] = normal(count)
    for e in range(EXPERTS.num_experts):
        for index, name in enumerate(("gate_proj", "up_proj")):
            weights[f"experts.{e}.{name}.weight"] = normal(48, 64, std=0.05 * 2**index)
        weights[f"experts.{e}.down_proj.weight"] = normal(64, 48)
    return weights


def join(weights: Weights) -> Weights:
    """The same weights as fused trainers name them: joined projections, experts stacked in 3-D."""
    joined = {name: w for name, w in weights.items() if "_proj" not in name}
    for fused, (shards, *_) in LINEARS.items():
        joined[f"{fused}.weight"] = torch.cat([weights[f"{shard}.weight"] for shard in shards])
    joined["qkv_proj.bias"] = torch.cat([weights[f"{shard}.bias"] for shard in LINEARS["qkv_proj"][0]])
    experts = [
        [weights[f"experts.{e}.{name}.weight"] for e in range(EXPERTS.num_experts)]
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    joined["experts.gate_up_proj"] = torch.cat([torch.stack(experts[0]), torch.stack(experts[1])], dim=1)
    joined["experts.down_proj"] = torch.stack(experts[2])
    return joined


def input_scales(seed: int) -> Weights:
    """A static activation scale for every quantizable module; unequal ones among experts, equal within a shard list."""
    generator = torch.Generator().manual_seed(seed)
    modules = [list(shards) for shards, *_ in LINEARS.values()]
    for e in range(EXPERTS.num_experts):
        modules += [[f"experts.{e}.gate_proj", f"experts.{e}.up_proj"], [f"experts.{e}.down_proj"]]
    scales = {}
    for group in modules:
        value = torch.rand((), generator=generator) * 0.01 + 0.001
        scales |= {f"{module}.input_scale": value for module in group}
    return scales


@pytest.fixture
def weights_a() -> Weights:
    return make_weights(1)


@pytest.fixture
def weights_b() -> Weights:
    return make_weights(2)


@pytest.fixture
def joined() -> Callable[[Weights], Weights]:
    return join


@pytest.fixture
def cold_load(make_policy: MakePolicy) -> Callable[..., Policy]:
    """A policy that has loaded these weights (and, if it is static, activation scales) as its first swap."""

    def load(scheme: Scheme, weights: Weights, mode: str = "staged", **options: str) -> Policy:
        policy = make_policy(scheme, mode, **options)
        static = scheme.activation == "static"
        policy.update({**weights, **(input_scales(3) if static else {})}, "cold")
        return policy

    return load


def snapshot_of(policy: Policy) -> dict[str, bytes]:
    """Every served byte, by slot and tensor; of clones, since torch does not free what numpy has seen."""
    return {
        f"{slot.name}/{next(iter(slot.matrices))}/{key}": t.clone().contiguous().view(torch.uint8).numpy().tobytes()
        for slot in policy.plan.slots
        for key, t in [*slot.tensors.items(), *slot.scales.items()]
    }


def addresses_of(policy: Policy) -> list[int]:
    return [t.data_ptr() for slot in policy.plan.slots for t in [*slot.tensors.values(), *slot.scales.values()]]


@pytest.fixture
def snapshot() -> Callable[[Policy], dict[str, bytes]]:
    return snapshot_of


@pytest.fixture
def addresses() -> Callable[[Policy], list[int]]:
    return addresses_of


@pytest.fixture
def buckets() -> Callable[[Weights, int], Iterator[list[tuple[str, Tensor]]]]:
    def cut(weights: Weights, size: int) -> Iterator[list[tuple[str, Tensor]]]:
        pairs = list(weights.items())
        yield from (pairs[start : start + size] for start in range(0, len(pairs), size))

    return cut
