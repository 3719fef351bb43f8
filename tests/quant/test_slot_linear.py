"""A slot's storage never moves; a linear is one slot and one kernel."""

import pytest
import torch

from rollmill.quant import (
    BF16,
    FP8,
    NVFP4,
    AmaxMeter,
    FP8Rows,
    Plain,
    QuantLinear,
    UnsupportedError,
    WeightShape,
    WeightSlot,
    find_capability,
    plain_slot,
)
from rollmill.quant.kernels.activation import fp8_codes
from rollmill.quant.kernels.exact import ExactKernel
from rollmill.quant.kernels.reference import ReferenceKernel

CPU = find_capability("cpu")
SCHEMES = [FP8(activation="static"), FP8(per_channel=True), NVFP4(activation="static"), NVFP4(activation="none")]


def scheme_id(scheme) -> str:
    return f"{scheme.name}{'_channel' if getattr(scheme, 'per_channel', False) else ''}-{scheme.activation}"


@pytest.fixture
def fill():
    """Write stored tensors into a slot as a session does: prepare, derive, commit."""

    def write(slot: WeightSlot, stored) -> None:
        scales = {name: stored[name] for name in slot.scale_specs}
        packed = slot.packer.prepare({name: stored[name] for name in slot.matrices})
        slot.commit({**packed, **slot.packer.derive(scales)}, scales, dict.fromkeys(stored, 1))

    return write


def make_slot(scheme, rows, cols, *, units=None, kernel=ReferenceKernel) -> WeightSlot:
    shape = WeightShape(rows, cols, units=units, one_scale=units is not None)
    modules = [[f"unit{unit}.shard{shard}" for shard in range(len(rows))] for unit in range(shape.num_units)]
    packer = kernel(scheme, shape, torch.float32, CPU)
    return WeightSlot("name", modules, scheme, shape, packer, device=CPU.device, fused=("joined",))


# slots


@pytest.mark.parametrize("units", [None, 3], ids=["linear", "stack"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_a_slot_holds_what_its_packer_and_scheme_say(scheme, units):
    slot = make_slot(scheme, (8, 4), 32, units=units)
    specs = slot.packer.packed()
    assert {name: (tuple(t.shape), t.dtype) for name, t in slot.tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert slot.matrices == scheme.matrices(slot.shape)
    assert slot.scale_specs == scheme.scales(slot.shape)
    assert {name: tuple(t.shape) for name, t in slot.scales.items()} == {
        name: spec.shape for name, spec in slot.scale_specs.items()
    }
    assert slot.num_bytes == sum(t.nbytes for t in slot.tensors.values())
    assert slot.shape.unit == WeightShape((8, 4), 32, one_scale=units is not None)
    assert not slot.kept
    assert not slot.loaded


@pytest.mark.parametrize("kernel", [ExactKernel, ReferenceKernel], ids=["exact", "reference"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_commit_copies_bytes_and_keeps_addresses(scheme, kernel, random_stored, same_bytes, fill):
    slot = make_slot(scheme, (8, 4), 32, kernel=kernel)
    addresses = {name: t.data_ptr() for name, t in {**slot.tensors, **slot.scales}.items()}
    for seed in (1, 2):
        stored = random_stored(scheme, (8, 4), 32, seed=seed)
        fill(slot, stored)
        scales = {name: stored[name] for name in slot.scale_specs}
        packed = {**slot.packer.prepare(stored), **slot.packer.derive(scales)}
        assert all(same_bytes(slot.tensors[name], packed[name]) for name in packed)
        assert all(same_bytes(slot.scales[name], stored[name]) for name in scales)
    assert slot.loaded
    assert {name: t.data_ptr() for name, t in {**slot.tensors, **slot.scales}.items()} == addresses


def test_commit_of_some_tensors_leaves_the_others(random_stored, same_bytes, fill):
    slot = make_slot(NVFP4(activation="static"), (8, 4), 32)
    fill(slot, random_stored(slot.scheme, (8, 4), 32))
    before = {name: t.clone() for name, t in {**slot.tensors, **slot.scales}.items()}
    scale = torch.full((2,), 0.125)
    slot.commit({"input_scale": scale}, {"input_scale": scale}, {"weight": 7})
    assert torch.equal(slot.tensors["input_scale"], scale)
    assert torch.equal(slot.scales["input_scale"], scale)
    assert slot.digests == {"weight": 7}
    assert all(same_bytes(slot.tensors[name], before[name]) for name in before if name != "input_scale")


def test_commit_of_the_served_tensors_themselves_changes_nothing(random_stored, same_bytes, fill):
    slot = make_slot(FP8(), (8, 4), 32)
    fill(slot, random_stored(slot.scheme, (8, 4), 32))
    before = {name: t.clone() for name, t in slot.tensors.items()}
    slot.commit(slot.tensors, slot.scales, {"weight": 1})
    assert all(same_bytes(slot.tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("kernel", [ExactKernel, ReferenceKernel], ids=["exact", "reference"])
def test_place_writes_one_unit_of_a_stack(kernel, random_stored, same_bytes):
    scheme = NVFP4()
    slot = make_slot(scheme, (8, 4), 32, units=3, kernel=kernel)
    stored = random_stored(scheme, (8, 4), 32, units=3)
    whole = slot.packer.prepare(stored)
    target = {name: torch.zeros_like(tensor) for name, tensor in slot.tensors.items()}
    slot.place(target, 1, slot.packer.prepare({name: tensor[1] for name, tensor in stored.items()}))
    for name, tensor in whole.items():
        assert same_bytes(target[name][1], tensor[1])
        assert not target[name][0].contiguous().view(torch.uint8).any()
        assert not target[name][2].contiguous().view(torch.uint8).any()


def test_place_writes_a_weight_without_units_whole(random_stored, same_bytes):
    slot = make_slot(FP8(), (8, 4), 32)
    packed = slot.packer.prepare(random_stored(FP8(), (8, 4), 32))
    slot.place(slot.tensors, 0, packed)
    assert same_bytes(slot.tensors["weight"], packed["weight"])


# linears


@pytest.mark.parametrize("kernel", ["auto", "exact", "reference"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_a_fused_linear_equals_its_fake_quantized_shards(scheme, kernel, random_stored, tokens, fill, ref):
    rows, cols = (33, 12, 20), 96
    linear = QuantLinear(
        ["q", "k", "v"], rows, cols, scheme, capability=CPU, dtype=torch.float32, kernel=kernel, fused="qkv"
    )
    stored, x = random_stored(scheme, rows, cols), tokens(cols, torch.float32)
    fill(linear.slot, stored)
    expected, mass = ref.linear(x, stored, rows, scheme)
    out = linear(x)
    assert (out.dtype, out.shape) == (torch.float32, (len(x), 65))
    assert ((out.double() - expected).abs() <= 1e-6 * mass).all()


def test_a_linear_adds_its_bias_to_every_token(tokens, fill):
    linear = QuantLinear(["q", "k"], (3, 2), 16, BF16, capability=CPU, dtype=torch.float32, bias=True, fused="qk")
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 16).bfloat16(), torch.arange(5).bfloat16()
    assert linear.bias is not None
    assert linear.slots == [linear.slot, linear.bias]
    fill(linear.slot, {"weight": weight})
    fill(linear.bias, {"bias": bias})
    x = tokens(16, torch.float32)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-3)


def test_names_of_a_fused_linear():
    linear = QuantLinear(["q", "k"], (3, 2), 16, FP8(), capability=CPU, dtype=torch.float32, bias=True, fused="qk")
    assert linear.bias is not None
    for slot in linear.slots:
        assert (slot.name, slot.modules, slot.fused) == ("qk", (("q", "k"),), ("qk",))
    assert linear.slot.shape == WeightShape((3, 2), 16)
    assert linear.bias.matrices.keys() == {"bias"}


def test_names_of_a_linear_alone():
    linear = QuantLinear(["o"], (3,), 16, FP8(), capability=CPU, dtype=torch.float32)
    assert linear.slots == [linear.slot]
    assert (linear.slot.name, linear.slot.modules, linear.slot.fused) == ("o", (("o",),), ())


@pytest.mark.parametrize(
    ("scheme", "dtype", "expected"),
    [
        (BF16, torch.bfloat16, torch.bfloat16),
        (BF16, torch.float32, torch.float32),
        (Plain(dtype=torch.float32, tensor="k_scale"), torch.bfloat16, torch.float32),
    ],
    ids=["norm_bf16", "norm_float32", "kv_scale"],
)
def test_plain_slots_hold_weights_in_the_engines_dtype_and_scales_in_their_own(scheme, dtype, expected, fill):
    slot = plain_slot(["m"], [4], None, scheme, CPU, dtype)
    value = torch.tensor([0.5, 1.0, -2.0, 3.0]).to(scheme.dtype)
    fill(slot, {scheme.tensor: value})
    assert slot.tensors[scheme.tensor].dtype == expected
    assert torch.equal(slot.tensors[scheme.tensor].float(), value.float())
    assert not slot.kept


def test_a_kept_plain_slot_keeps_its_tensor_when_it_does_not_arrive():
    slot = plain_slot(["m"], [1], None, Plain(dtype=torch.float32, tensor="k_scale"), CPU, torch.bfloat16, kept=True)
    assert slot.kept


# inputs that come quantized


@pytest.fixture
def fp8_linear(fill, random_stored):
    """A linear of `torch_fp8`, and FP8 rows for it with BF16 values."""
    scheme, rows, cols = FP8(per_channel=True), (16, 24), 64
    layer = QuantLinear(["q", "k"], rows, cols, scheme, capability=CPU, dtype=torch.bfloat16, kernel="torch_fp8")
    fill(layer.slot, random_stored(scheme, rows, cols))
    values = torch.randn(5, cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = fp8_codes(values, "per_token", None)
    return layer, FP8Rows(codes, scale[:, 0], values)


def test_codes_give_what_values_give(fp8_linear):
    layer, rows = fp8_linear
    assert layer.takes_codes
    assert torch.equal(layer(FP8Rows(rows.codes, rows.scale)), layer(rows.values))


def test_a_meter_is_shown_the_values(fp8_linear):
    layer, rows = fp8_linear
    expected = layer(rows.values)
    layer.slot.meter = meter = AmaxMeter(CPU.device)
    assert not layer.takes_codes
    assert torch.equal(layer(rows), expected)
    assert meter.amax == rows.values.abs().max()


def test_codes_alone_are_refused_where_values_are_read(fp8_linear):
    layer, rows = fp8_linear
    layer.slot.meter = AmaxMeter(CPU.device)
    with pytest.raises(UnsupportedError, match="only FP8 codes were kept"):
        layer(FP8Rows(rows.codes, rows.scale))


@pytest.mark.parametrize(
    ("scheme", "cols", "kernel"),
    [
        (FP8(activation="static"), 64, "torch_fp8"),
        (FP8(), 72, "torch_fp8"),
        (FP8(), 64, "exact"),
        (NVFP4(), 64, "exact"),
    ],
    ids=["static", "K to be padded", "exact", "nvfp4"],
)
def test_linears_that_quantize_themselves(scheme, cols, kernel):
    layer = QuantLinear(["q"], [16], cols, scheme, capability=CPU, dtype=torch.bfloat16, kernel=kernel)
    assert not layer.takes_codes
