"""Which linear kernels a batch-invariant engine takes, and why not the others."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import (
    BF16,
    FP8,
    LINEAR_KERNELS,
    NVFP4,
    Capability,
    QuantLinear,
    UnsupportedError,
    WeightShape,
    find_capability,
    judge_kernels,
    matmul,
    select_kernel,
    select_matmul,
)
from rollmill.quant.kernels.torch_fp8 import TorchFP8WeightOnly

SHAPE, BFLOAT16 = WeightShape((64,), 64), torch.bfloat16
CPU = find_capability("cpu")
HOPPER = Capability(torch.device("meta"), 90, ("triton",))
BLACKWELL = Capability(torch.device("meta"), 100, ("triton",))


def taken(scheme, capability, name="auto", dtype=BFLOAT16) -> str:
    return select_kernel(scheme, SHAPE, capability, dtype, name, batch_invariant=True).name


@pytest.mark.parametrize(
    ("scheme", "capability", "expected"),
    [
        (BF16, CPU, "bf16"),
        (FP8(), CPU, "exact"),
        (NVFP4(), CPU, "exact"),
        (BF16, HOPPER, "triton_bf16"),
        (FP8(), HOPPER, "torch_fp8"),
        (FP8(per_channel=True), HOPPER, "torch_fp8"),
        (FP8(activation="static"), HOPPER, "torch_fp8"),
        (NVFP4(), HOPPER, "triton_nvfp4_invariant"),
        (NVFP4(activation="none"), HOPPER, "triton_nvfp4_invariant"),
        (NVFP4(activation="static"), HOPPER, "triton_nvfp4_invariant"),
    ],
    ids=str,
)
def test_auto_takes_the_first_that_is(scheme, capability, expected):
    assert taken(scheme, capability) == expected


@pytest.mark.parametrize(
    ("scheme", "name", "reason"),
    [
        (FP8(), "triton_fp8", "triton_fp8: it sums few tokens in another order than many; torch_fp8 does not"),
        (FP8(), "exact", "exact: it multiplies through a library that chooses how to sum by the number of rows"),
        (NVFP4(), "reference", "reference: it multiplies through a library that chooses how to sum by the number of"),
        (NVFP4(), "triton_nvfp4", "triton_nvfp4: it sums many tokens in another order than few; triton_nvfp4_inv"),
        (NVFP4(), "torch_fp8", "torch_fp8: computes FP8 only"),
        (FP8(activation="per_tensor"), "torch_fp8", "torch_fp8: activations per tensor have one scale for all rows"),
    ],
    ids=str,
)
def test_a_named_kernel_that_is_not_raises_its_reason(scheme, name, reason):
    with pytest.raises(UnsupportedError, match="no batch-invariant linear kernel") as error:
        taken(scheme, HOPPER, name)
    (found,) = error.value.reasons
    assert found.startswith(reason)


@pytest.mark.parametrize("scheme", [BF16, FP8(), NVFP4()], ids=str)
def test_every_reason_is_listed_where_none_is(scheme):
    with pytest.raises(UnsupportedError) as error:
        taken(scheme, BLACKWELL)
    assert len(error.value.reasons) >= 2
    assert any("sm100" in reason for reason in error.value.reasons)


@pytest.mark.parametrize("scheme", [FP8(), NVFP4()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_float32_on_a_gpu_goes_through_a_library(scheme, dtype):
    with pytest.raises(UnsupportedError, match="library|BF16 results|bfloat16"):
        taken(scheme, HOPPER, dtype=torch.float32)


def test_every_kernel_says_whether_it_is():
    """None, or a reason."""
    for kernel in (*LINEAR_KERNELS, TorchFP8WeightOnly):
        for capability in (CPU, HOPPER, BLACKWELL):
            reason = kernel.batch_dependent(capability)
            assert reason is None or len(reason) > 20, kernel.name
    assert TorchFP8WeightOnly.batch_dependent(HOPPER) is not None


def test_a_torch_without_onednn_is_told(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="oneDNN"):
        taken(FP8(), CPU)


def test_the_flag_changes_no_other_verdict():
    plain = judge_kernels(FP8(), SHAPE, HOPPER, BFLOAT16)
    strict = judge_kernels(FP8(), SHAPE, HOPPER, BFLOAT16, batch_invariant=True)
    for (kernel, reason), (same, other) in zip(plain, strict, strict=True):
        assert kernel is same
        assert other == (reason or kernel.batch_dependent(HOPPER))


def test_layers_and_products_take_it():
    layer = QuantLinear(["a"], [64], 64, FP8(), capability=HOPPER, dtype=BFLOAT16, batch_invariant=True)
    assert layer.kernel.name == "torch_fp8"
    assert select_matmul(CPU, torch.float32, batch_invariant=True) is matmul
    assert select_matmul(HOPPER, BFLOAT16, batch_invariant=False) is matmul
