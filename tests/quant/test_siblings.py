"""Linears that are quantized together and computed one by one: what is shared, what is apart."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import (
    BF16,
    FP8,
    NVFP4,
    Capability,
    QuantLinear,
    SiblingLinears,
    UnsupportedError,
    find_capability,
    make_scheme,
)
from rollmill.quant.fp8_rows import FP8Rows
from rollmill.quant.kernels.activation import fp8_codes
from rollmill.quant.kernels.torch_fp8 import TorchFP8Kernel, cpu_takes_row_scales
from rollmill.weight_sync import Policy, SyncPlan

CPU = find_capability("cpu")
MODULES, ROWS, COLS = ["attn.to_q", "attn.to_k", "attn.to_v"], [48, 32, 16], 64
SCHEMES = {
    "bf16": BF16,
    "fp8-per_token": make_scheme("fp8"),
    "fp8-per_tensor": make_scheme("fp8", "per_tensor"),
    "fp8-static": make_scheme("fp8", "static"),
    "fp8_channel": make_scheme("fp8_channel"),
    "nvfp4-per_token": make_scheme("nvfp4"),
    "nvfp4-static": make_scheme("nvfp4", "static"),
    "nvfp4_w4a16": make_scheme("nvfp4_w4a16"),
}


@pytest.fixture(params=SCHEMES, ids=SCHEMES.keys())
def scheme(request):
    return SCHEMES[request.param]


@pytest.fixture(params=["reference", "exact"])
def kernel(request):
    return request.param


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weights():
    """Siblings of unequal amplitude, so that a shared scale differs from their own."""
    return {
        f"{name}.weight": (normal(rows, COLS, seed=i) * 4**i).bfloat16()
        for i, (name, rows) in enumerate(zip(MODULES, ROWS, strict=True))
    }


@pytest.fixture
def make(kernel):
    def build(scheme, dtype=torch.float32, **options):
        return SiblingLinears(
            "attn", MODULES, ROWS, COLS, scheme, capability=CPU, dtype=dtype, kernel=kernel, **options
        )

    return build


def load(slot, weights, scheme, values=(0.01, 0.02, 0.03)):
    scales = {f"{name}.input_scale": torch.tensor(value) for name, value in zip(MODULES, values, strict=True)}
    Policy(SyncPlan([slot])).update({**weights, **(scales if scheme.activation == "static" else {})}, "1")


def test_every_sibling_computes_its_rows_of_the_fused_linear(scheme, kernel, make, weights):
    """The fused linear is another class over the same scheme; its static scale is one for all."""
    siblings, fused = (
        make(scheme),
        QuantLinear(MODULES, ROWS, COLS, scheme, capability=CPU, dtype=torch.float32, kernel=kernel),
    )
    x, bias = normal(7, COLS, seed=9), normal(96, seed=8)
    for slot in (siblings.slot, fused.slot):
        load(slot, weights, scheme, values=(0.02, 0.02, 0.02))
    whole = fused(x).split(ROWS, dim=-1)
    for shard, (rows, expected) in enumerate(zip(ROWS, whole, strict=True)):
        torch.testing.assert_close(siblings.apply(shard, x), expected, rtol=1e-5, atol=1e-5)
        part = bias[:rows]
        torch.testing.assert_close(siblings.apply(shard, x, part), expected + part, rtol=1e-5, atol=1e-5)


def test_each_sibling_reads_its_own_static_scale(kernel, make, weights):
    for scheme in (SCHEMES["fp8-static"], SCHEMES["nvfp4-static"]):
        siblings, x = make(scheme), normal(5, COLS, seed=3)
        load(siblings.slot, weights, scheme)
        for shard, (module, rows) in enumerate(zip(MODULES, ROWS, strict=True)):
            alone = QuantLinear([module], [rows], COLS, scheme, capability=CPU, dtype=torch.float32, kernel=kernel)
            matrices = scheme.quantize(torch.cat(list(weights.values())), siblings.slot.shape)
            cut = siblings.slot.shape.shard_slice(shard)
            stored = {
                key: value[cut] if key in siblings.slot.matrices else value[shard] for key, value in matrices.items()
            }
            tensors = {f"{module}.{key}": value for key, value in stored.items()}
            tensors[f"{module}.input_scale"] = torch.tensor((0.01, 0.02, 0.03)[shard])
            Policy(SyncPlan([alone.slot])).update(tensors, "1")
            torch.testing.assert_close(siblings.apply(shard, x), alone(x), rtol=1e-6, atol=1e-6)


def test_what_is_shared_and_what_is_not(make, weights):
    """ModelOpt: NVFP4 takes one amax over all siblings, FP8 one of each."""
    amax = [float(w.abs().max()) for w in weights.values()]
    for scheme, key, expected in (
        (NVFP4(), "weight_scale_2", [max(amax) / 2688] * 3),
        (FP8(), "weight_scale", [one / 448 for one in amax]),
    ):
        siblings = make(scheme)
        load(siblings.slot, weights, scheme)
        assert siblings.slot.scales[key].tolist() == pytest.approx(expected, rel=1e-6)


def test_weight_only_leaves_activations_alone(scheme, make, weights):
    siblings = make(scheme)
    load(siblings.slot, weights, scheme)
    stored = scheme.quantize(torch.cat(list(weights.values())), siblings.slot.shape)
    decoded = scheme.dequantize(stored, siblings.slot.shape).split(ROWS)
    x = normal(5, COLS, seed=4)
    for shard, weight in enumerate(decoded):
        torch.testing.assert_close(siblings.apply_weight_only(shard, x), x @ weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", ["per_token", "per_tensor", "static"])
def test_weight_only_over_what_scaled_mm_has_packed(activation, weights, monkeypatch):
    """Unequal row scales, rows and columns that are padded; BF16 rounds products and results."""
    monkeypatch.setattr("rollmill.quant.kernels.torch_fp8.cpu_takes_row_scales", lambda: True)
    scheme, cols = make_scheme("fp8", activation), 60
    rows = [one - 3 for one in ROWS]
    siblings = SiblingLinears(
        "attn", MODULES, rows, cols, scheme, capability=CPU, dtype=torch.bfloat16, kernel="torch_fp8"
    )
    cut = [w[:count, :cols] for w, count in zip(weights.values(), rows, strict=True)]
    load(siblings.slot, dict(zip(weights, cut, strict=True)), scheme)
    assert siblings.no_weight_only is None
    stored = scheme.quantize(torch.cat(cut), siblings.slot.shape)
    decoded = scheme.dequantize(stored, siblings.slot.shape).split(rows)
    x, bias = normal(5, cols, seed=4).bfloat16(), normal(rows[0], seed=5).bfloat16()
    for shard, weight in enumerate(decoded):
        out = siblings.apply_weight_only(shard, x, bias[: rows[shard]])
        assert out.dtype == torch.bfloat16
        expected = x.float() @ weight.float().T + bias[: rows[shard]].float()
        torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))


def test_one_meter_sees_the_input_once(make, weights):
    scheme = SCHEMES["fp8-static"]
    siblings = make(scheme)
    load(siblings.slot, weights, scheme)
    seen = []
    siblings.slot.meter = seen.append
    x = normal(2, COLS)
    for shard in range(3):
        siblings.apply(shard, x)
    assert len(seen) == 1
    assert seen[0] is x


def test_a_format_that_cannot_hold_the_shape(kernel):
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        SiblingLinears("odd", ["odd"], [8], 40, NVFP4(), capability=CPU, dtype=torch.float32, kernel=kernel)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = Capability(DEVICE, 90, ("triton",))
multiplies_rows = pytest.mark.skipif(
    DEVICE.type == "cpu" and not cpu_takes_row_scales(), reason="this torch takes no scale a row on a CPU"
)


def on_hopper(scheme, rows=ROWS, kernel="torch_fp8"):
    """Siblings as a Hopper GPU has them."""
    return SiblingLinears(
        "attn", MODULES, list(rows), COLS, scheme, capability=HOPPER, dtype=torch.bfloat16, kernel=kernel
    )


@multiplies_rows
@pytest.mark.parametrize("kernel", ["torch_fp8", "triton_fp8"])
@pytest.mark.parametrize("name", ["bf16", "fp8-per_token", "fp8_channel"])
def test_on_a_gpu_siblings_are_rows_of_one_product(name, kernel, weights):
    """One packed weight; every sibling computes its rows of it, as it would alone."""
    if kernel == "triton_fp8":
        pytest.importorskip("triton", reason="triton is not installed")
    scheme = SCHEMES[name]
    siblings, x = on_hopper(scheme, kernel=kernel), normal(7, COLS, seed=9).bfloat16().to(DEVICE)
    load(siblings.slot, weights, scheme)
    assert siblings.joined is not None
    whole = siblings.joined.apply(x, siblings.slot.tensors)
    for shard, (module, expected) in enumerate(zip(MODULES, whole.split(ROWS, dim=-1), strict=True)):
        alone = QuantLinear(
            [module], [ROWS[shard]], COLS, scheme, capability=HOPPER, dtype=torch.bfloat16, kernel=kernel
        )
        load(alone.slot, {f"{module}.weight": weights[f"{module}.weight"]}, scheme)
        assert torch.equal(siblings.apply(shard, x), alone(x))
        torch.testing.assert_close(siblings.apply(shard, x), expected, rtol=2e-2, atol=1e-2)
        for key, part in siblings.packed(shard).items():
            assert torch.equal(part.float(), alone.slot.tensors[key].float())
            assert part.untyped_storage().data_ptr() == siblings.slot.tensors[key].untyped_storage().data_ptr()


@multiplies_rows
def test_released_siblings_come_back_whole(weights):
    """Rows are views: they follow their slot's storage out and in."""
    scheme = SCHEMES["fp8_channel"]
    siblings, x = on_hopper(scheme), normal(3, COLS, seed=9).bfloat16().to(DEVICE)
    load(siblings.slot, weights, scheme)
    before = [siblings.apply(shard, x) for shard in range(3)]
    siblings.slot.release()
    assert siblings.slot.num_bytes == 0
    siblings.slot.allocate()
    load(siblings.slot, weights, scheme)
    assert all(torch.equal(siblings.apply(shard, x), one) for shard, one in enumerate(before))


@pytest.mark.parametrize(
    ("name", "rows", "kernel"),
    [
        ("fp8-static", ROWS, "torch_fp8"),
        ("fp8_channel", (48, 30, 16), "torch_fp8"),
        ("nvfp4-per_token", ROWS, "exact"),
    ],
    ids=["a static scale each", "rows that are padded", "a kernel that packs otherwise"],
)
def test_what_stays_apart(name, rows, kernel):
    assert on_hopper(SCHEMES[name], rows, kernel).joined is None


@pytest.mark.gpu
def test_some_tokens_of_quantized_activations():
    """Scales of some tokens begin where cuBLAS cannot read them at once."""
    try:
        capability = find_capability("cuda")
    except UnsupportedError as error:
        pytest.skip(str(error))
    scheme, device = SCHEMES["fp8_channel"], capability.device
    layer = QuantLinear(["a"], [384], 128, scheme, capability=capability, dtype=torch.bfloat16, kernel="torch_fp8")
    load_alone = {"a.weight": normal(384, 128).bfloat16()}
    Policy(SyncPlan([layer.slot])).update(load_alone, "1")
    rows = FP8Rows(*fp8_codes(normal(14, 128, seed=3).bfloat16().to(device), "per_token", None))
    bias = normal(384, seed=4).bfloat16().to(device)
    assert isinstance(layer.kernel, TorchFP8Kernel)
    whole = layer.kernel.multiply(rows, layer.slot.tensors, bias)
    for first in range(14):
        some = FP8Rows(rows.codes[first:], rows.scale[first:])
        part = layer.kernel.multiply(some, layer.slot.tensors, bias, torch.empty_like(whole[first:]))
        torch.testing.assert_close(part, whole[first:], rtol=1e-2, atol=1e-2)
