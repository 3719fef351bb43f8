"""What a scheme stores: specs, sharing of scales, and ModelOpt's exported bytes reproduced without a difference."""

from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file

from rollmill.quant import BF16, FP8, NVFP4, Plain, TensorSpec, UnsupportedError, WeightShape, make_scheme

E4M3, FP32 = torch.float8_e4m3fn, torch.float32
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture
def bf16():
    """BF16 weights whose shards have amax 1, 2, 3 ..., so that shared and own scales differ."""

    def make(rows: Sequence[int], cols: int, *, units: int | None = None, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        lead = () if units is None else (units,)
        shards = []
        for shard, count in enumerate(rows):
            weight = torch.rand(*lead, count, cols, generator=generator) * 1.9 - 0.95
            weight[..., 1, 2] = -1.0
            shards.append(weight * (shard + 1))
        return torch.cat(shards, dim=-2).bfloat16()

    return make


# shapes


def test_weight_shape_of_a_fused_stack():
    shape = WeightShape((4, 2, 6), 32, units=3)
    assert (shape.num_rows, shape.num_units, shape.matrix) == (12, 3, (3, 12, 32))
    assert [shape.shard_slice(shard) for shard in range(3)] == [slice(0, 4), slice(4, 6), slice(6, 12)]
    per_row = shape.per_row(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert per_row.tolist() == [[1.0] * 4 + [2.0] * 2 + [3.0] * 6, [4.0] * 4 + [5.0] * 2 + [6.0] * 6]


def test_weight_shape_of_a_vector():
    shape = WeightShape((7,))
    assert (shape.num_units, shape.matrix) == (1, (7,))


@pytest.mark.parametrize(
    ("scheme", "matrices", "scales"),
    [
        (BF16, {"weight": TensorSpec((3, 24, 48), torch.bfloat16)}, {}),
        (
            FP8(activation="static"),
            {"weight": TensorSpec((3, 24, 48), E4M3)},
            {"weight_scale": TensorSpec((3, 2), FP32), "input_scale": TensorSpec((3, 2), FP32)},
        ),
        (
            FP8(activation="per_token", per_channel=True),
            {"weight": TensorSpec((3, 24, 48), E4M3)},
            {"weight_scale": TensorSpec((3, 24), FP32)},
        ),
        (
            NVFP4(activation="static"),
            {"weight": TensorSpec((3, 24, 24), torch.uint8), "weight_scale": TensorSpec((3, 24, 3), E4M3)},
            {"weight_scale_2": TensorSpec((3, 2), FP32), "input_scale": TensorSpec((3, 2), FP32)},
        ),
        (
            NVFP4(activation="none"),
            {"weight": TensorSpec((3, 24, 24), torch.uint8), "weight_scale": TensorSpec((3, 24, 3), E4M3)},
            {"weight_scale_2": TensorSpec((3, 2), FP32)},
        ),
    ],
    ids=["bf16", "fp8_static", "fp8_channel", "nvfp4_static", "nvfp4_w4a16"],
)
def test_stored_specs_of_a_stack_of_two_shards(scheme, matrices, scales):
    shape = WeightShape((8, 16), 48, units=3)
    assert scheme.matrices(shape) == matrices
    assert scheme.scales(shape) == scales


@pytest.mark.parametrize("shape", [WeightShape((8,), 40), WeightShape((8,))], ids=["k_40", "vector"])
def test_nvfp4_refuses_k_off_the_group_and_says_what_to_do(shape):
    with pytest.raises(UnsupportedError, match="K a multiple of 16") as error:
        NVFP4().matrices(shape)
    assert any("keep" in reason for reason in error.value.reasons)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("bf16", BF16),
        ("fp8", FP8(activation="static")),
        ("fp8_channel", FP8(activation="static", per_channel=True)),
        ("nvfp4", NVFP4(activation="static")),
        ("nvfp4_w4a16", NVFP4(activation="none")),
    ],
)
def test_make_scheme_by_name(name, scheme):
    assert make_scheme(name, "static") == scheme


@pytest.mark.parametrize(
    "scheme", [FP8(), FP8(per_channel=True), NVFP4(), NVFP4(activation="none"), BF16], ids=lambda s: repr(s)
)
@pytest.mark.parametrize("units", [None, 3], ids=["linear", "stack"])
def test_quantize_yields_exactly_what_the_specs_say(scheme, units, bf16):
    shape = WeightShape((20, 12), 48, units=units)
    stored = scheme.quantize(bf16(shape.rows, 48, units=units), shape)
    specs = {**scheme.matrices(shape), **scheme.scales(shape)}
    assert {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in stored.items()} == specs


# which scales are shared


def test_nvfp4_shards_share_the_joint_global_scale(bf16):
    shape = WeightShape((20, 12, 8), 48)
    stored = NVFP4().quantize(bf16(shape.rows, 48), shape)
    assert stored["weight_scale_2"].tolist() == [(torch.tensor(3.0) / 2688).item()] * 3


def test_fp8_shards_keep_their_own_scale(bf16):
    shape = WeightShape((20, 12, 8), 48)
    stored = FP8().quantize(bf16(shape.rows, 48), shape)
    assert stored["weight_scale"].tolist() == [(torch.tensor(amax) / 448).item() for amax in (1.0, 2.0, 3.0)]


@pytest.mark.parametrize(
    ("scheme", "scale", "limit"), [(FP8(), "weight_scale", 448), (NVFP4(), "weight_scale_2", 2688)]
)
def test_an_experts_gate_and_up_share_a_scale_and_experts_do_not(scheme, scale, limit, bf16):
    shape = WeightShape((20, 12), 48, units=3, one_scale=True)
    weight = bf16(shape.rows, 48, units=3) * torch.tensor([1, 2, 4]).view(3, 1, 1)
    stored = scheme.quantize(weight, shape)
    expected = [(torch.tensor(2.0 * factor) / limit).item() for factor in (1, 2, 4)]
    assert stored[scale].tolist() == [[value, value] for value in expected]


def test_fp8_channel_has_one_float32_scale_a_row_and_an_fp32_quotient(bf16, ref):
    shape = WeightShape((20, 12), 48)
    weight = bf16(shape.rows, 48)
    stored = FP8(per_channel=True).quantize(weight, shape)
    scale = weight.float().abs().amax(-1) / 448
    assert stored["weight_scale"].dtype == torch.float32
    assert torch.equal(stored["weight_scale"], scale)
    assert torch.equal(stored["weight"].view(torch.uint8), ref.fp8_weight(weight, scale, bf16_quotient=False))


@pytest.mark.parametrize("scheme", [FP8(), FP8(per_channel=True), NVFP4()], ids=["fp8", "fp8_channel", "nvfp4"])
def test_a_weight_of_zeros_decodes_to_zeros(scheme):
    shape = WeightShape((4, 4), 32)
    stored = scheme.quantize(torch.zeros(8, 32).bfloat16(), shape)
    scale = stored["weight_scale_2" if scheme.name == "nvfp4" else "weight_scale"]
    assert (scale == 1.0).all()
    assert not scheme.dequantize(stored, shape).any()


@pytest.mark.parametrize(
    "scheme", [FP8(), FP8(per_channel=True), NVFP4(), NVFP4(activation="none")], ids=lambda s: repr(s)
)
@pytest.mark.parametrize("cols", [1040, 1024])
def test_quantize_and_dequantize_follow_the_recipes(scheme, cols, bf16, ref):
    shape = WeightShape((300, 212), cols)
    weight = bf16(shape.rows, cols)
    stored = scheme.quantize(weight, shape)
    if scheme.name == "nvfp4":
        codes, scales = ref.nvfp4_weight(weight, ref.spread(stored["weight_scale_2"], shape.rows))
        assert torch.equal(stored["weight_scale"].view(torch.uint8), scales)
    else:
        row_scale = stored["weight_scale"] if scheme.per_channel else ref.spread(stored["weight_scale"], shape.rows)
        codes = ref.fp8_weight(weight, row_scale, bf16_quotient=not scheme.per_channel)
    assert torch.equal(stored["weight"].view(torch.uint8), codes)
    expected = ref.weight(stored, shape.rows, scheme)
    torch.testing.assert_close(scheme.dequantize(stored, shape).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", [FP8(), FP8(per_channel=True), NVFP4()], ids=["fp8", "fp8_channel", "nvfp4"])
def test_unequal_foreign_scales_are_dequantized_shard_by_shard(scheme, random_stored, ref):
    rows = (16, 8, 24)
    stored = random_stored(scheme, rows, 64)
    decoded = scheme.dequantize(stored, WeightShape(rows, 64))
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.double(), ref.weight(stored, rows, scheme), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", [FP8(), FP8(per_channel=True), NVFP4()], ids=["fp8", "fp8_channel", "nvfp4"])
def test_a_stack_is_quantized_unit_by_unit(scheme, bf16, same_bytes):
    rows, weight = (20, 12), bf16((20, 12), 48, units=4)
    stack = scheme.quantize(weight, WeightShape(rows, 48, units=4, one_scale=True))
    for unit in range(4):
        alone = scheme.quantize(weight[unit], WeightShape(rows, 48, one_scale=True))
        for name, tensor in alone.items():
            assert same_bytes(stack[name][unit], tensor), name


@pytest.mark.parametrize("scheme", [FP8(), NVFP4()], ids=["fp8", "nvfp4"])
def test_quantize_leaves_the_weight_alone_and_repeats_itself(scheme, bf16, same_bytes):
    shape = WeightShape((20, 12), 48)
    weight = bf16(shape.rows, 48)
    kept = weight.clone()
    first, second = scheme.quantize(weight, shape), scheme.quantize(weight, shape)
    assert torch.equal(weight, kept)
    assert all(same_bytes(first[name], second[name]) for name in first)


def test_plain_tensors_keep_their_values_in_their_own_dtype():
    kv_scale = Plain(dtype=torch.float32, tensor="k_scale")
    shape = WeightShape((1,))
    value = torch.tensor([0.1])
    assert kv_scale.matrices(shape) == {"k_scale": TensorSpec((1,), torch.float32)}
    assert torch.equal(kv_scale.quantize(value, shape)["k_scale"], value)
    assert torch.equal(kv_scale.dequantize({"k_scale": value}, shape), value)


# ModelOpt's own bytes


def sharing_groups(model: str) -> list[tuple[bool, list[str]]]:
    """(one scale in FP8 too, modules that ModelOpt quantizes together) for all quantized modules."""
    groups = []
    for layer in ("model.layers.0", "model.layers.1"):
        groups.append((False, [f"{layer}.self_attn.{name}" for name in QKV]))
        groups.append((False, [f"{layer}.self_attn.o_proj"]))
        experts = [f".experts.{expert}" for expert in range(8)] if model == "qwen3_moe" else [""]
        for expert in experts:
            prefix = f"{layer}.mlp{expert}"
            groups.append((bool(expert), [f"{prefix}.gate_proj", f"{prefix}.up_proj"]))
            groups.append((False, [f"{prefix}.down_proj"]))
    return groups


def split_stored(
    stored: dict[str, torch.Tensor], shape: WeightShape, modules: Sequence[str]
) -> dict[str, torch.Tensor]:
    """One quantized weight -> the tensors that a checkpoint names module by module."""
    split = {}
    for shard, module in enumerate(modules):
        for name, tensor in stored.items():
            split[f"{module}.{name}"] = tensor[shape.shard_slice(shard)] if tensor.dim() == 2 else tensor[shard]
    return split


@pytest.mark.parametrize("export", ["fp8", "nvfp4", "fp8_kvfp8", "nvfp4_kvfp8"])
@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_stored_bytes_equal_modelopts_export(model, export, modelopt_folder, bf16_weights, same_bytes):
    scheme = NVFP4(activation="static") if export.startswith("nvfp4") else FP8(activation="static")
    source = bf16_weights(model)
    made = {}
    for one_scale, modules in sharing_groups(model):
        weights = [source[f"{module}.weight"] for module in modules]
        shape = WeightShape(tuple(len(w) for w in weights), weights[0].shape[1], one_scale=one_scale)
        made.update(split_stored(scheme.quantize(torch.cat(weights), shape), shape, modules))
    exported = load_file(modelopt_folder(model, export) / "model.safetensors")
    quantized = {name for name in exported if name.endswith(".weight_scale")}
    expected = {
        name: tensor
        for name, tensor in exported.items()
        if name.endswith((".weight_scale", ".weight_scale_2")) or name.replace(".weight", ".weight_scale") in quantized
    }
    assert made.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(made[name], expected[name])] == []


@pytest.mark.parametrize("export", ["fp8", "nvfp4"])
def test_a_stack_of_experts_equals_modelopts_export(export, modelopt_folder, bf16_weights, same_bytes):
    scheme = NVFP4() if export == "nvfp4" else FP8()
    source, exported = bf16_weights("qwen3_moe"), load_file(modelopt_folder("qwen3_moe", export) / "model.safetensors")
    names = [[f"model.layers.1.mlp.experts.{e}.{p}" for p in ("gate_proj", "up_proj")] for e in range(8)]
    weight = torch.stack([torch.cat([source[f"{name}.weight"] for name in unit]) for unit in names])
    shape = WeightShape((96, 96), 128, units=8, one_scale=True)
    stored = scheme.quantize(weight, shape)
    for unit, modules in enumerate(names):
        made = split_stored({name: tensor[unit] for name, tensor in stored.items()}, shape, modules)
        assert [name for name in made if not same_bytes(made[name], exported[name])] == []
