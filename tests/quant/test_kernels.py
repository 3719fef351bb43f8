"""The choice of a kernel, and every kernel against a fake-quantized float64 product."""

from collections.abc import Mapping

import pytest
import torch

from rollmill.quant import (
    BF16,
    FP8,
    LINEAR_KERNELS,
    NVFP4,
    Capability,
    TensorSpec,
    UnsupportedError,
    WeightShape,
    find_capability,
    select_kernel,
)
from rollmill.quant.kernel import GPU_ORDER
from rollmill.quant.kernels.activation import quantize_activation
from rollmill.quant.kernels.exact import ExactKernel
from rollmill.quant.kernels.plain import PlainKernel
from rollmill.quant.kernels.reference import ReferenceKernel
from rollmill.quant.kernels.torch_fp8 import TorchFP8Kernel
from rollmill.quant.kernels.triton_fp8 import TritonFP8Kernel
from rollmill.quant.kernels.triton_nvfp4 import TritonNVFP4Kernel

CPU = Capability(torch.device("cpu"), None, ())
HOPPER = Capability(torch.device("cuda"), 90, ())
HOPPER_TRITON = Capability(torch.device("cuda"), 90, ("triton",))
AMPERE = Capability(torch.device("cuda"), 80, ())

FP8_SCHEMES = [
    FP8(activation=activation, per_channel=per_channel)
    for per_channel in (False, True)
    for activation in ("static", "per_tensor", "per_token")
]
WEIGHT_ONLY = [FP8(activation="none"), FP8(activation="none", per_channel=True), NVFP4(activation="none")]
NVFP4_SCHEMES = [NVFP4(activation=activation) for activation in ("static", "per_tensor", "per_token")]
SCHEMES = [*FP8_SCHEMES, *NVFP4_SCHEMES, *WEIGHT_ONLY]
CASES = [
    *((kernel, scheme) for kernel in (ExactKernel, ReferenceKernel) for scheme in SCHEMES),
    *((TorchFP8Kernel, scheme) for scheme in FP8_SCHEMES),
]

# Roundings to BF16, in units of the result's last place: every kernel sums in float32 and rounds once.
BF16_ULP = {"reference": 0.5, "torch_fp8": 0.5, "exact": 0.5}
# What float32 sums of some 1000 terms may lose: this share of the sum of magnitudes.
FLOAT32_SHARE = 1e-6


def scheme_id(scheme) -> str:
    channel = "_channel" if getattr(scheme, "per_channel", False) else ""
    return f"{scheme.name}{channel}-{scheme.activation}"


def case_id(value) -> str:
    return value.name if isinstance(value, type) else scheme_id(value)


def pack(kernel, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a session does: matrices are prepared, float32 scales derived."""
    names = kernel.scheme.matrices(kernel.shape)
    matrices = {name: stored[name] for name in names}
    return {**kernel.prepare(matrices), **kernel.derive({k: v for k, v in stored.items() if k not in names})}


def bf16_ulp(x: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2.0**-126))) - 7)


def assert_near(out: torch.Tensor, expected: torch.Tensor, mass: torch.Tensor, *, ulps: float) -> None:
    """|out - expected| within `ulps` BF16 last places and the float32 sums' share of `mass`."""
    error = (out.double() - expected).abs()
    limit = ulps * bf16_ulp(expected) + FLOAT32_SHARE * mass
    worst = (error / limit.clamp(min=1e-300)).max().item()
    assert worst <= 1, f"worst error is {worst:.2f} times the limit"


# values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1000,), (96, 33, 72)], ids=["odd_n", "fused"])
@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=case_id)
def test_kernel_equals_the_fake_quantized_product(kernel, scheme, rows, dtype, random_stored, tokens, ref):
    cols = 1040 if scheme.name == "nvfp4" else 1000
    stored, x = random_stored(scheme, rows, cols), tokens(cols, dtype)
    bound = kernel(scheme, WeightShape(rows, cols), dtype, CPU)
    out = bound.apply(x, pack(bound, stored))
    assert (out.dtype, out.shape) == (dtype, (len(x), sum(rows)))
    rounds = dtype == torch.bfloat16 or kernel is TorchFP8Kernel
    assert_near(out, *ref.linear(x, stored, rows, scheme), ulps=BF16_ULP[kernel.name] if rounds else 0)


@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=case_id)
def test_kernel_with_one_token(kernel, scheme, random_stored, tokens, ref):
    cols, rows = 1040, (48, 16)
    stored, x = random_stored(scheme, rows, cols), tokens(cols, torch.bfloat16)[4:5]
    bound = kernel(scheme, WeightShape(rows, cols), torch.bfloat16, CPU)
    assert_near(bound.apply(x, pack(bound, stored)), *ref.linear(x, stored, rows, scheme), ulps=BF16_ULP[kernel.name])


@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=case_id)
def test_kernel_with_no_tokens(kernel, scheme, random_stored):
    bound = kernel(scheme, WeightShape((48, 16), 64), torch.bfloat16, CPU)
    packed = pack(bound, random_stored(scheme, (48, 16), 64))
    assert bound.apply(torch.empty(0, 64, dtype=torch.bfloat16), packed).shape == (0, 64)


@pytest.mark.parametrize("kernel", [ExactKernel, ReferenceKernel], ids=case_id)
@pytest.mark.parametrize("scheme", [FP8(activation="static"), NVFP4(activation="static")], ids=scheme_id)
def test_unequal_input_scales_stay_with_their_shards(kernel, scheme, random_stored, tokens, ref):
    rows, cols = (32, 24, 40), 256
    stored, x = random_stored(scheme, rows, cols), tokens(cols, torch.float32)
    stored["input_scale"] = stored["input_scale"] * torch.tensor([1.0, 2.0, 0.4])
    bound = kernel(scheme, WeightShape(rows, cols), torch.float32, CPU)
    expected, mass = ref.linear(x, stored, rows, scheme)
    assert_near(bound.apply(x, pack(bound, stored)), expected, mass, ulps=0)
    widest = {**stored, "input_scale": stored["input_scale"].amax().expand(3)}
    assert ((expected - ref.linear(x, widest, rows, scheme)[0]).abs() > FLOAT32_SHARE * mass).any(), "a max would pass"


def test_torch_fp8_refuses_unequal_input_scales_and_says_what_to_choose(random_stored):
    scheme = FP8(activation="static")
    stored = random_stored(scheme, (32, 16), 64)
    stored["input_scale"] = torch.tensor([1.0, 2.0])
    with pytest.raises(UnsupportedError, match="unequal input scales") as error:
        pack(TorchFP8Kernel(scheme, WeightShape((32, 16), 64), torch.bfloat16, CPU), stored)
    assert any("exact" in reason for reason in error.value.reasons)


@pytest.mark.parametrize(("kernel", "scheme"), [case for case in CASES if case[1].activation == "static"], ids=case_id)
def test_units_of_a_stack_are_computed_alone_with_their_own_scales(kernel, scheme, random_stored, tokens, ref):
    rows, cols = (32, 16), 128
    stored, x = random_stored(scheme, rows, cols, units=3), tokens(cols, torch.float32)
    bound = kernel(scheme, WeightShape(rows, cols, units=3), torch.float32, CPU)
    packed = pack(bound, stored)
    for unit in range(3):
        out = bound.apply(x, {name: tensor[unit] for name, tensor in packed.items()})
        expected = ref.linear(x, {name: tensor[unit] for name, tensor in stored.items()}, rows, scheme)
        assert_near(out, *expected, ulps=0.5 if kernel is TorchFP8Kernel else 0)


@pytest.mark.parametrize("scheme", [*FP8_SCHEMES[:3], *NVFP4_SCHEMES], ids=scheme_id)
def test_sums_of_codes_stay_within_float16(scheme, random_stored, tokens, ref):
    """Codes times block scales reach 2688; their sums leave float16's range long before the result does."""
    rows, shape = (48,), WeightShape((48,), 512)
    stored, x = random_stored(scheme, rows, 512), tokens(512, torch.float16)[4:]
    expected, mass = ref.linear(x, stored, rows, scheme)
    assert expected.abs().max() < 6e4, "the result itself fits"
    bound = select_kernel(scheme, shape, CPU, torch.float16)(scheme, shape, torch.float16, CPU)
    out = bound.apply(x, pack(bound, stored))
    assert out.dtype == torch.float16
    assert_near(out, expected, mass, ulps=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_kernel_multiplies_as_it_is(dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(33, 40).bfloat16(), torch.randn(5, 40).to(dtype)
    bound = PlainKernel(BF16, WeightShape((33,), 40), dtype, CPU)
    packed = {"weight": bound.prepare({"weight": weight})["weight"].float()}  # as a slot on a CPU holds it
    expected = x.double() @ weight.double().T
    assert_near(bound.apply(x, packed), expected, x.double().abs() @ weight.double().abs().T, ulps=0.5)


# activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.activation != "static"], ids=scheme_id)
def test_activation_values_and_scale_make_the_fake_quantized_input(scheme, dtype, tokens, ref):
    x = tokens(256, dtype)
    kept = x.clone()
    values, scale = quantize_activation(x, scheme, None, torch.float32)
    decoded = values.double() if scale is None else values.double() * scale.double()
    torch.testing.assert_close(decoded, ref.activation(x, scheme, None), rtol=1e-6, atol=0)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("scheme", [FP8(activation="static"), NVFP4(activation="static")], ids=scheme_id)
def test_static_activations_saturate_beyond_their_scale(scheme, tokens, ref):
    x, input_scale = tokens(256, torch.bfloat16), torch.tensor(1e-3)
    values, scale = quantize_activation(x, scheme, input_scale, torch.float32)
    assert scale is not None
    torch.testing.assert_close(
        values.double() * scale.double(), ref.activation(x, scheme, input_scale), rtol=1e-6, atol=0
    )
    assert values.max() == (2688 if scheme.name == "nvfp4" else 448)


@pytest.mark.parametrize("amax", [1e-45, 1e-43, 1e-40, 1e-38], ids=str)
@pytest.mark.parametrize("scheme", [FP8(), FP8(activation="per_tensor"), NVFP4()], ids=scheme_id)
def test_float32_rows_of_denormals_stay_finite(scheme, amax):
    x = torch.zeros(2, 64)
    x[0, 5] = amax
    values, scale = quantize_activation(x, scheme, None, torch.float32)
    assert values.isfinite().all()
    assert scale is not None
    assert scale.isfinite().all()


@pytest.mark.parametrize("scheme", [FP8(), NVFP4()], ids=scheme_id)
def test_values_of_an_activation_are_exact_in_bf16(scheme, tokens):
    x = tokens(256, torch.bfloat16)
    wide, _ = quantize_activation(x, scheme, None, torch.float32)
    narrow, _ = quantize_activation(x, scheme, None, torch.bfloat16)
    assert torch.equal(wide, narrow.float())


# packing


@pytest.mark.parametrize(("rows", "cols"), [((33, 12), 48), ((32, 16), 64)], ids=["odd", "aligned"])
@pytest.mark.parametrize("units", [None, 3], ids=["linear", "stack"])
@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=case_id)
def test_packing_is_pure_and_yields_what_it_says(kernel, scheme, units, rows, cols, random_stored, same_bytes):
    stored = random_stored(scheme, rows, cols, units=units)
    kept = {name: tensor.clone() for name, tensor in stored.items()}
    bound = kernel(scheme, WeightShape(rows, cols, units=units), torch.bfloat16, CPU)
    first, second = pack(bound, stored), pack(bound, stored)
    assert {name: tuple(t.shape) for name, t in first.items()} == {n: spec.shape for n, spec in bound.packed().items()}
    for name, spec in bound.packed().items():  # what is narrower is widened where it is placed: nothing is lost
        assert first[name].dtype == spec.dtype or (first[name].dtype, spec.dtype) == (torch.bfloat16, torch.float32)
    assert all(same_bytes(first[name], second[name]) for name in first)
    assert all(same_bytes(stored[name], kept[name]) for name in stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_packing_is_the_weight_and_a_cpu_widens_it(dtype, same_bytes):
    weight = torch.randn(8, 16).bfloat16()
    kept = weight.clone()
    bound = PlainKernel(BF16, WeightShape((8,), 16), dtype, CPU)
    packed = bound.prepare({"weight": weight})
    assert bound.packed() == {"weight": TensorSpec((8, 16), torch.float32)}
    assert PlainKernel(BF16, WeightShape((8,)), dtype, CPU).packed() == {"weight": TensorSpec((8,), dtype)}
    assert PlainKernel(BF16, WeightShape((8,), 16), dtype, HOPPER).packed() == {"weight": TensorSpec((8, 16), dtype)}
    assert bound.derive({}) == {}
    assert same_bytes(packed["weight"], kept)
    assert same_bytes(weight, kept)


@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=case_id)
def test_a_stack_is_prepared_alike_in_parts(kernel, scheme, random_stored, same_bytes):
    rows, cols = (33, 12), 48
    stored = random_stored(scheme, rows, cols, units=4)
    names = scheme.matrices(WeightShape(rows, cols))
    bound = kernel(scheme, WeightShape(rows, cols, units=4), torch.bfloat16, CPU)
    whole = bound.prepare({name: stored[name] for name in names})
    for part in (slice(0, 1), slice(1, 4)):
        made = bound.prepare({name: stored[name][part] for name in names})
        assert all(same_bytes(made[name], whole[name][part]) for name in whole)
    alone = bound.prepare({name: stored[name][2] for name in names})
    assert all(same_bytes(alone[name], whole[name][2]) for name in whole)


def test_exact_packs_the_exact_products(random_stored, ref):
    scheme, rows, cols = NVFP4(), (16, 8), 64
    stored = random_stored(scheme, rows, cols)
    weight = ExactKernel(scheme, WeightShape(rows, cols), torch.bfloat16, CPU).prepare(stored)["weight"]
    ones = {**stored, "weight_scale_2": torch.ones(2)}
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.double(), ref.weight(ones, rows, scheme))


def test_torch_fp8_pads_with_zeros_and_keeps_the_codes(random_stored):
    scheme, rows, cols = FP8(), (33, 12), 1000
    stored = random_stored(scheme, rows, cols)
    packed = pack(TorchFP8Kernel(scheme, WeightShape(rows, cols), torch.bfloat16, CPU), stored)
    codes = packed["weight"].view(torch.uint8)
    assert codes.shape == (48, 1008)
    assert torch.equal(codes[:45, :1000], stored["weight"].view(torch.uint8))
    assert int((codes != 0).sum()) == int((stored["weight"].view(torch.uint8) != 0).sum())
    assert packed["row_scale"].tolist() == [
        [stored["weight_scale"][0]] * 33 + [stored["weight_scale"][1]] * 12 + [0.0] * 3
    ]


# the choice

SHAPE = WeightShape((64,), 64)


def names_of(*kernels) -> list[str]:
    return [kernel.name for kernel in kernels]


def test_names_of_kernels_are_unique():
    names = names_of(*LINEAR_KERNELS)
    assert len(set(names)) == len(names)
    backends = {"trtllm", "cute_dsl", "cutlass", "cudnn", "auto", "fp8"}
    assert {name.removeprefix("flashinfer_") for name in names if name.startswith("flashinfer_")} == backends


@pytest.mark.parametrize(
    ("scheme", "capability", "dtype", "expected"),
    [
        (FP8(), CPU, torch.float32, "reference"),
        (NVFP4(), CPU, torch.float32, "reference"),
        (FP8(), HOPPER, torch.float32, "reference"),
        (FP8(), CPU, torch.bfloat16, "exact"),
        (NVFP4(), CPU, torch.bfloat16, "exact"),
        (FP8(), HOPPER, torch.bfloat16, "torch_fp8"),
        (FP8(), HOPPER_TRITON, torch.bfloat16, "triton_fp8"),
        (FP8(), HOPPER_TRITON, torch.float16, "torch_fp8"),
        (NVFP4(), HOPPER, torch.bfloat16, "exact"),
        (NVFP4(), HOPPER_TRITON, torch.bfloat16, "triton_nvfp4"),
        (NVFP4(activation="none"), HOPPER_TRITON, torch.bfloat16, "triton_nvfp4"),
        (NVFP4(activation="per_tensor"), HOPPER_TRITON, torch.bfloat16, "exact"),
        (NVFP4(), HOPPER_TRITON, torch.float16, "exact"),
        (FP8(), AMPERE, torch.bfloat16, "exact"),
        (FP8(activation="none"), HOPPER, torch.bfloat16, "exact"),
        (BF16, HOPPER, torch.bfloat16, "bf16"),
        (BF16, CPU, torch.float32, "bf16"),
    ],
    ids=lambda value: scheme_id(value) if hasattr(value, "activation") else str(value),
)
def test_auto_walks_the_written_order(scheme, capability, dtype, expected):
    assert select_kernel(scheme, SHAPE, capability, dtype).name == expected


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("exact", torch.bfloat16),
        ("exact", torch.float32),
        ("reference", torch.bfloat16),
        ("reference", torch.float32),
        ("torch_fp8", torch.bfloat16),
        ("torch_fp8", torch.float16),
    ],
    ids=str,
)
def test_a_named_kernel_is_taken_whatever_auto_would_take(name, dtype):
    assert select_kernel(FP8(), SHAPE, CPU, dtype, name).name == name


@pytest.mark.parametrize(
    ("name", "scheme", "dtype", "reason"),
    [
        ("torch_fp8", FP8(), torch.float32, "BF16 results"),
        ("torch_fp8", FP8(activation="none"), torch.bfloat16, "stay as they are"),
        ("torch_fp8", NVFP4(), torch.bfloat16, "FP8 only"),
    ],
    ids=["fp8_float32", "fp8_w8a16", "fp8_nvfp4"],
)
def test_a_named_kernel_that_cannot_says_why(name, scheme, dtype, reason):
    with pytest.raises(UnsupportedError, match=reason):
        select_kernel(scheme, SHAPE, CPU, dtype, name)


@pytest.mark.parametrize("name", ["auto", "exact", "torch_fp8", "reference"])
def test_unquantized_layers_have_one_kernel(name):
    assert select_kernel(BF16, SHAPE, CPU, torch.bfloat16, name) is PlainKernel


def test_an_unknown_kernel_is_named_with_the_known_ones():
    with pytest.raises(UnsupportedError, match="'marlin' is unknown") as error:
        select_kernel(FP8(), SHAPE, CPU, torch.bfloat16, "marlin")
    assert error.value.reasons == (f"known: auto, {', '.join(names_of(*LINEAR_KERNELS))}",)


@pytest.mark.parametrize(
    ("scheme", "capability", "name", "reason"),
    [
        (NVFP4(), CPU, "torch_fp8", "torch_fp8: computes FP8 only"),
        (FP8(), AMPERE, "torch_fp8", "torch_fp8: FP8 tensor cores start at sm89, this is sm80"),
        (FP8(), CPU, "bf16", "bf16: computes unquantized weights only"),
        (NVFP4(), HOPPER, "bf16", "bf16: computes unquantized weights only"),
    ],
    ids=["nvfp4_on_torch_fp8", "torch_fp8_on_sm80", "fp8_on_bf16", "nvfp4_on_bf16"],
)
def test_a_named_kernel_that_cannot_raises_its_reason(scheme, capability, name, reason):
    with pytest.raises(UnsupportedError) as error:
        select_kernel(scheme, SHAPE, capability, torch.bfloat16, name)
    assert error.value.reasons == (reason,)
    assert scheme.name in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per_tensor", "per_channel"])
def test_torch_fp8_refuses_to_leave_activations_unquantized(per_channel):
    """FP8 x FP8 cannot honour `activation="none"`; another scale mode in its place would be silent."""
    with pytest.raises(UnsupportedError, match="torch_fp8"):
        select_kernel(FP8(activation="none", per_channel=per_channel), SHAPE, CPU, torch.bfloat16, "torch_fp8")


def test_every_reason_is_listed_when_no_kernel_can(monkeypatch):
    for kernel in (ExactKernel, ReferenceKernel, TorchFP8Kernel, TritonFP8Kernel, TritonNVFP4Kernel):
        monkeypatch.setattr(kernel, "unsupported", staticmethod(lambda *args, why=kernel.name: f"no {why} today"))
    with pytest.raises(UnsupportedError, match=r"no linear kernel for fp8 \[64, 64\] on sm90") as error:
        select_kernel(FP8(), SHAPE, HOPPER, torch.bfloat16)
    assert error.value.reasons == tuple(f"{name}: no {name} today" for name in GPU_ORDER)


# the machine


def test_a_cpu_has_no_compute_capability():
    capability = find_capability("cpu")
    assert (capability.device, capability.sm, str(capability)) == (torch.device("cpu"), None, "cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_capability("auto").device.type == "cpu"
    with pytest.raises(UnsupportedError, match="torch sees no GPU"):
        find_capability("cuda")
