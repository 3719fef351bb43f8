"""Rounding, packing and the two NVFP4 recipes, against sorted tables and written-out formulas."""

import pytest
import torch

from rollmill.quant import numerics

MIDPOINTS = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INFINITY = torch.tensor(float("inf"))


def round_once(value: float) -> float:
    return numerics.round_e2m1(torch.tensor([value])).item()


def code_once(value: float) -> int:
    return int(numerics.e2m1_codes(torch.tensor([value])).item())


# E2M1


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize(("midpoint", "expected"), MIDPOINTS.items())
def test_e2m1_ties_go_to_the_even_code(midpoint: float, expected: float, sign: int):
    assert round_once(sign * midpoint) == sign * expected
    assert code_once(sign * midpoint) == VALUES.index(expected) + (8 if sign < 0 else 0)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("index", range(7))
def test_e2m1_neighbours_of_a_midpoint_go_to_their_own_side(index: int, sign: int):
    midpoint = torch.tensor(list(MIDPOINTS)[index])
    below, above = torch.nextafter(midpoint, -INFINITY).item(), torch.nextafter(midpoint, INFINITY).item()
    assert (round_once(sign * below), round_once(sign * above)) == (sign * VALUES[index], sign * VALUES[index + 1])
    assert (code_once(sign * below) & 7, code_once(sign * above) & 7) == (index, index + 1)


@pytest.mark.parametrize("value", [6.0, 6.0000005, 7.0, 448.0, 1e30, 3.4e38, float("inf")])
def test_e2m1_saturates_at_six(value: float):
    assert (round_once(value), round_once(-value)) == (6.0, -6.0)
    assert (code_once(value), code_once(-value)) == (7, 15)


def test_e2m1_codes_keep_the_sign_of_zero():
    assert [code_once(v) for v in (0.0, -0.0, 1e-45, -1e-45, 0.25, -0.25)] == [0, 8, 0, 8, 0, 8]


def test_e2m1_on_a_fine_grid(ref):
    x = torch.arange(-(8 << 14), (8 << 14) + 1) / 2.0**14
    assert torch.equal(numerics.e2m1_codes(x).long(), ref.e2m1(x))
    assert torch.equal(numerics.round_e2m1(x.clone()).double(), ref.e2m1_table[ref.e2m1(x)])


def test_e2m1_on_every_bf16_number(ref, all_bf16):
    x = all_bf16.float()
    assert torch.equal(numerics.e2m1_codes(x).long(), ref.e2m1(x))
    assert torch.equal(numerics.round_e2m1(x.clone()).double(), ref.e2m1_table[ref.e2m1(x)])


def test_e2m1_codes_leave_their_input_alone():
    x = torch.linspace(-9, 9, 64)
    kept = x.clone()
    numerics.e2m1_codes(x)
    assert torch.equal(x, kept)


def test_pack_nibbles_puts_even_k_low():
    codes = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij"), dim=-1).reshape(16, 32)
    packed = numerics.pack_nibbles(codes.int())
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[low | (high << 4) for high in range(16)] for low in range(16)]


def test_decode_e2m1_of_every_byte():
    decoded = numerics.decode_e2m1(torch.arange(256, dtype=torch.uint8).view(2, 128)).view(256, 2)
    signed = [*VALUES, *(-v for v in VALUES)]
    assert decoded.tolist() == [[signed[byte & 15], signed[byte >> 4]] for byte in range(256)]


# E4M3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_decode_fp8_of_every_byte(ref, dtype: torch.dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    decoded = numerics.decode_fp8(codes, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded.double().nan_to_num(-1e9), ref.e4m3_table.nan_to_num(-1e9))
    assert decoded[[0x00, 0x80]].signbit().tolist() == [False, True]


def test_quantize_fp8_of_every_bf16_number(ref, all_bf16):
    codes = numerics.quantize_fp8(all_bf16[None], torch.ones(1))
    assert torch.equal(codes.view(torch.uint8)[0], ref.e4m3(all_bf16.float()))


def test_quantize_fp8_activation_saturates_and_rounds_in_float32(ref):
    x = torch.linspace(-600, 600, 40001)[None] / 3
    scale = torch.tensor([[0.3]])
    codes = numerics.quantize_fp8_activation(x, scale)
    assert torch.equal(codes.view(torch.uint8), ref.e4m3(x / scale))
    assert ref.e4m3_values(codes).abs().max() == 448


@pytest.mark.parametrize("bf16_quotient", [True, False], ids=["bf16_quotient", "fp32_quotient"])
def test_quantize_fp8_rounds_the_quotient_as_named(ref, bf16_quotient: bool):
    torch.manual_seed(0)
    weight = torch.randn(64, 512).bfloat16()
    scale = weight.abs().amax().float().expand(64) / 448 * torch.rand(64).add(0.9)  # some rows saturate
    codes = numerics.quantize_fp8(weight, scale, bf16_quotient=bf16_quotient).view(torch.uint8)
    assert torch.equal(codes, ref.fp8_weight(weight, scale, bf16_quotient=bf16_quotient))
    other = ref.fp8_weight(weight, scale, bf16_quotient=not bf16_quotient)
    assert 0.01 < (codes != other).float().mean() < 0.05, "the two roundings differ in 2 to 3 % of codes"


@pytest.mark.parametrize("shape", [(3, numerics.CHUNK + 16), (300, 1040), (2, 5, 48)], ids=str)
def test_quantize_fp8_over_chunk_borders_and_stacks(ref, shape: tuple[int, ...]):
    torch.manual_seed(1)
    weight = torch.randn(shape).bfloat16()
    scale = torch.rand(shape[:-1]) * 0.01 + 0.005
    codes = numerics.quantize_fp8(weight, scale, bf16_quotient=True).view(torch.uint8)
    expected = ref.fp8_weight(weight.flatten(0, -2), scale.flatten(), bf16_quotient=True)
    assert torch.equal(codes.flatten(0, -2), expected)


def test_decode_scale_is_one_for_zeros():
    amax = torch.tensor([0.0, 448.0, 1.0, 1e-38])
    assert numerics.decode_scale(amax, 448.0).tolist() == [1.0, 1.0, (amax[2] / 448).item(), (amax[3] / 448).item()]


@pytest.mark.parametrize("group", [16, 48, 192])
def test_group_amax_is_the_largest_magnitude(group: int, all_bf16):
    weight = all_bf16[torch.randperm(all_bf16.numel(), generator=torch.Generator().manual_seed(0))][: 192 * 300]
    weight = weight.view(300, 192)
    expected = torch.stack([part.float().abs().amax(-1) for part in weight.split(group, dim=-1)], dim=-1)
    amax = numerics.group_amax(weight, group)
    assert amax.dtype == torch.bfloat16
    assert torch.equal(amax.float(), expected)


# NVFP4 weights


def weight_case(name: str) -> torch.Tensor:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(2))
    match name:
        case "zero_blocks":
            weight[::2, 16:32], weight[5] = 0, 0
        case "outlier":  # other blocks fall below the smallest block scale
            weight[3, 7] = 4e5
        case "tiny":
            weight *= 1e-38
        case "denormal":
            weight *= 1e-39
        case "huge":
            weight = (weight * 1e38).clamp(-3.3e38, 3.3e38)
        case "negative_zeros":
            weight[:, ::3] = -0.0
        case "tiny_negatives":
            weight[:, 1::4] = -1e-9
        case "ties":  # block amax 6, so that the quotients are the values themselves
            grid = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
            weight[:] = torch.cat([grid, -grid]).repeat(6)
            weight[0, 0] = 2688.0
    return weight.bfloat16()


CASES = ["gaussian", "zero_blocks", "outlier", "tiny", "denormal", "huge", "negative_zeros", "tiny_negatives", "ties"]


@pytest.mark.parametrize("name", CASES)
def test_nvfp4_weight_bytes(ref, name: str):
    weight = weight_case(name)
    scale_2 = (weight.float().abs().amax() / 2688).expand(32)
    codes, scale = numerics.quantize_nvfp4_weight(weight, numerics.group_amax(weight, 16), scale_2)
    expected_codes, expected_scale = ref.nvfp4_weight(weight, scale_2)
    assert torch.equal(scale.view(torch.uint8), expected_scale)
    assert torch.equal(codes, expected_codes)


def test_nvfp4_weight_of_zeros_has_scale_one_and_code_zero():
    weight = torch.zeros(2, 32).bfloat16()
    weight[:, ::2] = -0.0
    codes, scale = numerics.quantize_nvfp4_weight(weight, numerics.group_amax(weight, 16), torch.ones(2))
    assert scale.view(torch.uint8).tolist() == [[0x38, 0x38]] * 2
    assert not codes.any()


def test_nvfp4_weight_scale_is_clamped_at_both_ends():
    weight = torch.tensor([1.0, 1e-6, 1e6]).bfloat16().repeat_interleave(16)[None]
    _, scale = numerics.quantize_nvfp4_weight(weight, numerics.group_amax(weight, 16), torch.tensor([1 / 6]))
    assert scale.float().tolist() == [[1.0, 2.0**-9, 448.0]]


def test_nvfp4_weight_keeps_the_sign_of_negatives_that_round_to_zero():
    weight = torch.full((1, 16), -0.01).bfloat16()
    weight[0, 0] = 6.0
    codes, _ = numerics.quantize_nvfp4_weight(weight, numerics.group_amax(weight, 16), torch.ones(1))
    assert codes.tolist() == [[0x87] + [0x88] * 7]


@pytest.mark.parametrize("shape", [(1000, 1040), (2, numerics.CHUNK + 32), (3, 4, 64)], ids=str)
def test_nvfp4_weight_over_chunk_borders_and_stacks(ref, shape: tuple[int, ...]):
    torch.manual_seed(3)
    weight = torch.randn(shape).bfloat16()
    scale_2 = torch.rand(shape[:-1]) * 1e-3 + 1e-3
    codes, scale = numerics.quantize_nvfp4_weight(weight, numerics.group_amax(weight, 16), scale_2)
    expected_codes, expected_scale = ref.nvfp4_weight(weight.flatten(0, -2), scale_2.flatten())
    assert codes.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(codes.flatten(0, -2), expected_codes)
    assert torch.equal(scale.flatten(0, -2).view(torch.uint8), expected_scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nvfp4_products_are_exact_for_every_code_and_scale(ref, dtype: torch.dtype):
    codes = torch.arange(16).to(torch.uint8)
    packed = (codes[0::2] | (codes[1::2] << 4)).expand(127, 8).contiguous()
    scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].contiguous()
    expected = ref.e4m3_table[:127, None] * ref.e2m1_table
    products = numerics.nvfp4_products(packed, scale, dtype)
    assert products.dtype == dtype
    assert torch.equal(products.double(), expected)


# NVFP4 activations


def activation_case(name: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    match name:
        case "zero_rows":
            x[::3] = 0
            x[1, :64] = -0.0
        case "denormal_rows":
            x *= 1e-39
        case "below_flt_max":  # 2688 / amax overflows float32
            x *= 1e-36
        case "large":
            x = (x * 1e38).clamp(-3.3e38, 3.3e38)
        case "outliers":
            x[:, 5] *= 1e5
        case "mixed":
            x *= 10.0 ** torch.arange(-32, 32, 4)[:, None]
    return x.to(dtype)


ACTIVATIONS = ["gaussian", "zero_rows", "denormal_rows", "below_flt_max", "large", "outliers", "mixed"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nvfp4_per_token_recipe(ref, name: str, dtype: torch.dtype):
    x = activation_case(name, dtype)
    encode = numerics.nvfp4_encode(x.float().abs().amax(-1, keepdim=True))
    assert torch.equal(encode, ref.token_encode(x.float().abs().amax(-1, keepdim=True)))
    values, scale = numerics.quantize_nvfp4_activation(x, encode)
    codes, scale_bytes = ref.nvfp4_activation(x, encode)
    assert torch.equal(scale.double(), ref.e4m3_values(scale_bytes))
    assert torch.equal(values.flatten(1).double(), ref.e2m1_table[codes])


@pytest.mark.parametrize("encode", [1e-3, 1.0, 896.0, 3e5])
def test_nvfp4_recipe_with_one_static_scale(ref, encode: float):
    x = activation_case("outliers", torch.bfloat16)
    values, scale = numerics.quantize_nvfp4_activation(x, torch.tensor(encode))
    codes, scale_bytes = ref.nvfp4_activation(x, torch.tensor(encode))
    assert torch.equal(scale.double(), ref.e4m3_values(scale_bytes))
    assert torch.equal(values.flatten(1).double(), ref.e2m1_table[codes])


@pytest.mark.parametrize("name", ["gaussian", "large", "outliers", "mixed"])
def test_the_block_of_the_row_maximum_has_scale_448(name: str):
    x = activation_case(name, torch.bfloat16)
    _, scale = numerics.quantize_nvfp4_activation(x, numerics.nvfp4_encode(x.float().abs().amax(-1, keepdim=True)))
    top = x.float().abs().argmax(-1) // 16
    assert (scale.gather(1, top[:, None]) == 448).all()
    assert scale.max() == 448


def test_a_zero_row_has_zero_codes_zero_scales_and_the_largest_encode_scale():
    x = torch.zeros(2, 32).bfloat16()
    encode = numerics.nvfp4_encode(x.float().abs().amax(-1, keepdim=True))
    values, scale = numerics.quantize_nvfp4_activation(x, encode)
    assert encode.tolist() == [[torch.finfo(torch.float32).max]] * 2
    assert not values.any()
    assert not scale.any()


def test_a_row_is_quantized_alike_in_any_batch_and_its_input_is_untouched():
    x = activation_case("mixed", torch.bfloat16)
    kept = x.clone()
    values, scale = numerics.quantize_nvfp4_activation(x, numerics.nvfp4_encode(x.float().abs().amax(-1, keepdim=True)))
    assert torch.equal(x, kept)
    for row in range(16):
        alone = x[row : row + 1]
        values_alone, scale_alone = numerics.quantize_nvfp4_activation(
            alone, numerics.nvfp4_encode(alone.float().abs().amax(-1, keepdim=True))
        )
        assert torch.equal(values_alone[0], values[row])
        assert torch.equal(scale_alone[0], scale[row])


def test_per_token_error_of_gaussian_rows_is_that_of_the_format():
    x = torch.randn(256, 2048, generator=torch.Generator().manual_seed(5)).bfloat16()
    encode = numerics.nvfp4_encode(x.float().abs().amax(-1, keepdim=True))
    values, scale = numerics.quantize_nvfp4_activation(x, encode)
    error = (values * scale[..., None]).flatten(1) / encode - x.float()
    assert (error.norm() / x.float().norm()).item() == pytest.approx(0.0957, abs=0.001)
