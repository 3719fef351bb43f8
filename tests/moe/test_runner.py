"""The choice of a runner, and the shapes that it packs."""

import pytest
import torch

from rollmill.moe import MOE_RUNNERS, MoeConfig, RoutedExperts, select_runner
from rollmill.moe.runners.reference import ReferenceRunner, expert_shapes
from rollmill.moe.runners.triton import TritonRunner
from rollmill.quant import BF16, FP8, NVFP4, Capability, UnsupportedError, WeightShape, find_capability

CPU = find_capability("cpu")
CONFIG = MoeConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=48)


@pytest.fixture
def refusing(monkeypatch):
    """Every runner says why it cannot."""
    for runner in MOE_RUNNERS:
        monkeypatch.setattr(runner, "unsupported", staticmethod(lambda *args, why=runner.name: f"{why} rests"))


@pytest.mark.parametrize("scheme", [BF16, FP8(), NVFP4()], ids=["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_the_reference_runner_takes_every_scheme(scheme, name):
    assert select_runner(CONFIG, scheme, CPU, name) is ReferenceRunner


def test_names_of_runners_are_unique():
    names = [runner.name for runner in MOE_RUNNERS]
    assert len(set(names)) == len(names)
    assert "auto" not in names


def test_an_unknown_runner_is_named_with_the_known_ones():
    with pytest.raises(UnsupportedError, match="'flashinfer_magic' is unknown") as error:
        select_runner(CONFIG, FP8(), CPU, "flashinfer_magic")
    assert error.value.reasons == (f"known: auto, {', '.join(runner.name for runner in MOE_RUNNERS)}",)


@pytest.mark.usefixtures("refusing")
def test_every_reason_is_listed_when_no_runner_can():
    hopper = Capability(torch.device("cuda"), 90, ())
    with pytest.raises(UnsupportedError, match="no MoE runner for nvfp4 on sm90") as error:
        select_runner(CONFIG, NVFP4(), hopper)
    assert error.value.reasons == tuple(f"{runner.name}: {runner.name} rests" for runner in MOE_RUNNERS)


@pytest.mark.usefixtures("refusing")
def test_a_named_runner_that_cannot_raises_its_own_reason():
    with pytest.raises(UnsupportedError) as error:
        select_runner(CONFIG, FP8(), CPU, "reference")
    assert error.value.reasons == ("reference: reference rests",)


def test_gate_over_up_is_one_weight_with_one_scale_an_expert():
    w13, w2 = expert_shapes(CONFIG)
    assert w13 == WeightShape((48, 48), 64, units=4, one_scale=True)
    assert w2 == WeightShape((64,), 48, units=4)


@pytest.mark.parametrize("name", ["exact", "reference"])
def test_the_reference_runner_packs_as_its_linear_kernel_does(name):
    runner = ReferenceRunner(CONFIG, NVFP4(), CPU, torch.bfloat16, name)
    assert (runner.w13.name, runner.w2.name) == (name, name)
    assert (runner.w13.shape, runner.w2.shape) == expert_shapes(CONFIG)


def test_a_shape_that_nvfp4_cannot_hold_is_refused_by_name():
    odd = MoeConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=40)
    runner = ReferenceRunner(odd, NVFP4(), CPU, torch.float32)
    with pytest.raises(UnsupportedError, match="K a multiple of 16"):
        runner.w2.packed()


def test_a_linear_kernel_by_name_is_what_computes_experts(monkeypatch):
    """A runner that has products of its own could not honour it."""
    monkeypatch.setattr(TritonRunner, "unsupported", staticmethod(lambda *args: None))
    made = RoutedExperts(
        "experts",
        ("gate", "up", "down"),
        CONFIG,
        FP8(),
        capability=CPU,
        dtype=torch.bfloat16,
        linear_kernel="exact",
    )
    assert made.runner.name == "reference"


def test_tiles_of_hopper_are_for_hopper():
    config = MoeConfig(num_experts=4, top_k=2, hidden_size=512, intermediate_size=256)
    for sm in (80, 89, 100, 120):
        reason = TritonRunner.unsupported(
            config, FP8(), Capability(torch.device("cuda"), sm, ("triton",)), torch.bfloat16
        )
        assert reason is not None
        assert f"sm{sm}" in reason


HOPPER = Capability(torch.device("meta"), 90, ("triton",))
WIDE = MoeConfig(num_experts=4, top_k=2, hidden_size=128, intermediate_size=128)


@pytest.mark.parametrize("scheme", [BF16, FP8(), NVFP4(), NVFP4(activation="none")], ids=str)
@pytest.mark.parametrize(("capability", "expected"), [(CPU, "reference"), (HOPPER, "triton")], ids=["cpu", "hopper"])
def test_batch_invariant_runners(scheme, capability, expected):
    assert select_runner(WIDE, scheme, capability, batch_invariant=True).name == expected


@pytest.mark.parametrize(
    ("scheme", "capability", "name", "reason"),
    [
        (FP8(), HOPPER, "reference", "through a library"),
        (BF16, Capability(torch.device("meta"), 100, ("triton",)), "triton", "sum alike on sm90, and this is sm100"),
        (FP8(activation="per_tensor"), CPU, "reference", "one scale for all rows"),
    ],
    ids=["library", "blackwell", "per_tensor"],
)
def test_runners_that_are_not_batch_invariant(scheme, capability, name, reason):
    assert select_runner(WIDE, scheme, capability, name).name == name
    with pytest.raises(UnsupportedError, match="no batch-invariant MoE runner") as error:
        select_runner(WIDE, scheme, capability, name, batch_invariant=True)
    assert reason in error.value.reasons[0]


def test_experts_of_linear_kernels_are_what_these_are():
    settings = {"capability": CPU, "dtype": torch.bfloat16, "linear_kernel": "torch_fp8", "batch_invariant": True}
    with pytest.raises(UnsupportedError, match="no batch-invariant linear kernel"):
        RoutedExperts("x", ("gate", "up", "down"), CONFIG, FP8(), **settings)
