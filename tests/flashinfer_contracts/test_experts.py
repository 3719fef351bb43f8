"""Routed experts through TensorRT-LLM's kernels: packed bytes read back, outputs beside float32 arithmetic."""

from __future__ import annotations

import pytest
import torch
from kernel_models.decoding import decode_e4m3, decode_nvfp4, split_gated_rows, unshuffle_rows

from rollmill.moe import MoeConfig, route, select_runner
from rollmill.moe.runners import trtllm_experts
from rollmill.moe.runners.flashinfer_trtllm import FlashInferTrtllm, FlashInferTrtllmRouted, pack_choices
from rollmill.moe.runners.reference import expert_shapes
from rollmill.quant import FP8, NVFP4, UnsupportedError, layout
from rollmill.quant.kernels.activation import quantize_activation
from rollmill.quant.numerics import decode_fp8, nvfp4_products

ALIGNED = MoeConfig(num_experts=6, top_k=2, hidden_size=128, intermediate_size=128)
PADDED = MoeConfig(num_experts=6, top_k=2, hidden_size=160, intermediate_size=48)
CONFIGS = {"aligned": ALIGNED, "padded": PADDED}
SCHEMES = {
    "nvfp4_static": NVFP4("static"),
    "nvfp4": NVFP4("per_token"),
    "fp8_static": FP8("static"),
    "fp8": FP8("per_token"),
    "fp8_channel": FP8("per_token", per_channel=True),
}
BY_NAME = {"routed": FlashInferTrtllmRouted, "in_kernel": FlashInferTrtllm}


@pytest.fixture
def runner(blackwell):
    """A runner, where this FlashInfer has what it calls."""

    def make(name, scheme, config=ALIGNED):
        reason = BY_NAME[name].unsupported(config, scheme, blackwell, torch.bfloat16)
        if reason is not None:
            pytest.skip(reason)
        return BY_NAME[name](config, scheme, blackwell, torch.bfloat16)

    return make


@pytest.fixture
def stored_experts(stored_weight):
    def make(scheme, config, *, unequal=False):
        w13, w2 = expert_shapes(config)
        return [
            stored_weight(scheme, w13, amax=3.0, unequal=unequal),
            stored_weight(scheme, w2, amax=1.0, unequal=unequal),
        ]

    return make


def pack(runner, stored):
    packed = []
    for packer, values in zip((runner.w13, runner.w2), stored, strict=True):
        made = packer.prepare(values) | packer.derive(values)
        assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in packer.packed().items()
        }
        packed.append(made)
    return packed


def tokens_of(config, count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, config.hidden_size, generator=generator).bfloat16()
    return x, torch.randn(count, config.num_experts, generator=generator)


def weights_of(scheme, shape, stored, expert):
    """float32 [rows, cols] of one expert."""
    return scheme.dequantize({name: value[expert] for name, value in stored.items()}, shape.unit)


def fake_quantize(x, scheme, stored):
    """Activations as quantized; static scales are the stack's largest."""
    scale = stored["input_scale"].amax() if "input_scale" in stored else None
    values, decode_scale = quantize_activation(x, scheme, scale, torch.float32)
    assert decode_scale is not None
    return values * decode_scale


def expected_output(config, scheme, stored, x, ids, weights):
    """A loop over tokens and choices: nothing of the product's runners."""
    w13_shape, w2_shape = expert_shapes(config)
    codes = fake_quantize(x, scheme, stored[0])
    out = torch.zeros(len(x), config.hidden_size)
    for token in range(len(x)):
        for choice, expert in enumerate(ids[token].tolist()):
            both = codes[token : token + 1] @ weights_of(scheme, w13_shape, stored[0], expert).t()
            gate, up = both.split(config.intermediate_size, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            if scheme.activation == "per_token":
                inner = inner.bfloat16()
            down = fake_quantize(inner, scheme, stored[1]) @ weights_of(scheme, w2_shape, stored[1], expert).t()
            out[token] += down[0].bfloat16().float() * weights[token, choice]
    return out


def run(runner, stored, x, logits):
    ids, weights = route(logits, runner.config)
    packed = pack(runner, stored)
    if not runner.routes:
        return runner.apply(x, ids, weights, *packed), ids, weights
    out, found = runner.apply_logits(x, logits, None, *packed)
    assert found.dtype == torch.int16
    assert torch.equal(found.long().sort(-1).values, ids.sort(-1).values)
    return out, ids, weights.bfloat16().float()  # the kernel's own router rounds them


def assert_matches(runner, stored, x, logits):
    """Float32 rounding: a few flipped codes of the inner activations and one BF16 rounding are all that may differ."""
    out, ids, weights = run(runner, stored, x, logits)
    if not runner.routes and not runner.capability.flashinfer.routing_pairs:
        weights = weights.bfloat16().float()  # packed choices hold BF16 weights
    expected = expected_output(runner.config, runner.scheme, stored, x, ids, weights)
    assert out.shape == expected.shape
    assert out.dtype == torch.bfloat16
    error = (out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # the kernel's FP8 quantizer multiplies with 448 / amax where ours divides: more flipped codes
    assert error.max().item() < (8e-3 if runner.scheme == FP8("per_token", per_channel=True) else 4e-3), error


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_packed_bytes_hold_the_stored_values(scheme, config, runner, stored_experts):
    made, stored = runner("in_kernel" if scheme == FP8("static") else "routed", scheme, config), None
    stored = stored_experts(scheme, config)
    w13, w2 = pack(made, stored)
    inner, hidden = config.intermediate_size, config.hidden_size

    def read(packed, expert):
        if isinstance(scheme, NVFP4):
            return decode_nvfp4(packed["weight"][expert], packed["block_scale"][expert], "128x4")
        return decode_e4m3(packed["weight"][expert])

    def stored_codes(values, expert):
        if isinstance(scheme, NVFP4):
            return nvfp4_products(values["weight"][expert], values["weight_scale"][expert], torch.float32)
        return decode_fp8(values["weight"][expert])

    for expert in range(config.num_experts):
        up, gate = split_gated_rows(read(w13, expert))
        down = unshuffle_rows(read(w2, expert))
        expected = stored_codes(stored[0], expert)
        assert torch.equal(gate[:inner, :hidden], expected[:inner])
        assert torch.equal(up[:inner, :hidden], expected[inner:])
        assert torch.equal(down[:hidden, :inner], stored_codes(stored[1], expert))
        for padded, (rows, cols) in ((up, (inner, hidden)), (gate, (inner, hidden)), (down, (hidden, inner))):
            assert not padded[rows:].any()
            assert not padded[:, cols:].any()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("name", BY_NAME)
def test_output(name, scheme, config, runner, stored_experts):
    assert_matches(runner(name, scheme, config), stored_experts(scheme, config), *tokens_of(config, 9))


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("scheme", [NVFP4("static"), NVFP4("per_token")], ids=["static", "per_token"])
@pytest.mark.parametrize("name", BY_NAME)
def test_top_1_to_8(name, scheme, top_k, runner, stored_experts):
    config = MoeConfig(num_experts=8, top_k=top_k, hidden_size=128, intermediate_size=64)
    assert_matches(runner(name, scheme, config), stored_experts(scheme, config), *tokens_of(config, 4))


@pytest.mark.parametrize("scheme", [NVFP4("static"), NVFP4("per_token")], ids=["static", "per_token"])
def test_gate_and_up_with_different_global_scales(scheme, runner, stored_experts):
    stored = stored_experts(scheme, ALIGNED, unequal=True)
    scales = stored[0]["weight_scale_2"]
    assert (scales[:, 0] != scales[:, 1]).any()
    assert_matches(runner("routed", scheme), stored, *tokens_of(ALIGNED, 7))


def test_experts_with_different_input_scales_take_the_largest(runner, stored_experts):
    scheme = NVFP4("static")
    stored = stored_experts(scheme, ALIGNED)
    stored[0]["input_scale"] *= torch.linspace(0.5, 1, 12).view(6, 2)
    stored[1]["input_scale"] *= torch.linspace(1, 0.5, 6).view(6, 1)
    assert_matches(runner("routed", scheme), stored, *tokens_of(ALIGNED, 7))


def test_no_tokens(runner, stored_experts):
    made = runner("routed", NVFP4("per_token"))
    packed = pack(made, stored_experts(made.scheme, ALIGNED))
    x, ids, weights = torch.empty(0, 128).bfloat16(), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2)
    assert made.apply(x, ids, weights, *packed).shape == (0, 128)


@pytest.mark.parametrize("bias", [None, torch.linspace(-0.4, 0.4, 8)], ids=["no_bias", "bias"])
def test_groups_and_bias_in_the_kernels_router(bias, runner, stored_experts):
    config = MoeConfig(8, 2, 128, 64, scoring="sigmoid", n_group=4, topk_group=2, routed_scaling_factor=2.5)
    made = runner("in_kernel", NVFP4("per_token"), config)
    stored = stored_experts(made.scheme, config)
    x, logits = tokens_of(config, 6)
    ids, weights = route(logits, config, bias)
    out, found = made.apply_logits(x, logits, bias, *pack(made, stored))
    assert torch.equal(found.long().sort(-1).values, ids.sort(-1).values)
    expected = expected_output(config, made.scheme, stored, x, ids, weights.bfloat16().float())
    error = (out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max().item() < 6e-3  # its weights are BF16, ours float32 until here


def test_what_the_library_was_told(runner, stored_experts, model_library):
    """a13 = a2 = 1 per token; gate and up alphas each in its place; members of enums; a declared layout."""
    made = runner("routed", NVFP4("per_token"))
    stored = stored_experts(made.scheme, ALIGNED, unequal=True)
    run(made, stored, *tokens_of(ALIGNED, 5))
    quantized = next(b.arguments for name, b in reversed(model_library.calls) if name == "nvfp4_quantize")
    assert quantized["a_global_sf"] == 1 / 2688
    assert quantized["per_token_activation"] is True
    call = next(b.arguments for name, b in reversed(model_library.calls) if name == "trtllm_fp4_block_scale_routed_moe")
    assert torch.equal(call["output1_scale_gate_scalar"], stored[0]["weight_scale_2"][:, 0])
    assert torch.equal(call["output1_scale_scalar"], stored[0]["weight_scale_2"][:, 1])
    assert torch.equal(call["output2_scale_scalar"], stored[1]["weight_scale_2"][:, 0])
    assert call["per_token_scale"].shape == (5,)


def test_packed_choices_keep_the_id_whatever_the_weight():
    ids = torch.tensor([[0, 127, 383]])
    packed = pack_choices(ids, torch.tensor([[0.5, -1.0, 1.0]]))
    assert torch.equal(packed >> 16, ids.int())
    bits = torch.tensor([0.5, -1.0, 1.0]).bfloat16().view(torch.int16).int() & 0xFFFF
    assert torch.equal(packed[0] & 0xFFFF, bits)


def test_auto_prefers_our_router(blackwell):
    for scheme in (NVFP4("static"), NVFP4("per_token")):
        assert select_runner(ALIGNED, scheme, blackwell) is FlashInferTrtllmRouted
    static = select_runner(ALIGNED, FP8("static"), blackwell)
    assert static is (FlashInferTrtllmRouted if blackwell.flashinfer.fp8_per_tensor_routed else FlashInferTrtllm)


@pytest.mark.parametrize(
    ("config", "scheme", "words"),
    [
        (MoeConfig(8, 2, 128, 64, bias=True), NVFP4(), "without biases"),
        (MoeConfig(8, 2, 128, 64, activation="gelu_tanh"), NVFP4(), "SwiGLU"),
        (ALIGNED, NVFP4("none"), "'none'"),
        (ALIGNED, FP8("per_tensor"), "'per_tensor'"),
        (MoeConfig(8, 2, 128, 64, routed_scaling_factor=2.0), NVFP4(), "no such router"),
    ],
    ids=["bias", "gelu", "w4a16", "per_tensor", "scaled"],
)
def test_reasons(config, scheme, words, blackwell):
    with pytest.raises(UnsupportedError) as error:
        select_runner(config, scheme, blackwell, "flashinfer_trtllm")
    assert words in str(error.value)


# each of these mutations must be seen


def _gate_for_up(real):
    def derive(self, scales):
        packed = real(self, scales)
        return packed | ({"up_scale": packed["gate_scale"].clone()} if self.gated else {})

    return derive


MUTATIONS = {
    "swapped nibbles": (layout, "gather_rows", lambda real: lambda x, i: real(_swapped(x), i)),
    "gate and up exchanged": (layout, "gated_reorder_index", lambda real: lambda rows: real(rows).roll(rows // 2)),
    "linear scales": (layout, "swizzle_scales", lambda real: lambda scales: scales),
    "no padding": (trtllm_experts, "padded_size", lambda real: lambda size: size),
    "gate alpha used for up": (trtllm_experts.TrtllmExperts, "derive", _gate_for_up),
    "shuffle off by one": (layout, "shuffle_rows_index", lambda real: lambda *a, **k: real(*a, **k).roll(1)),
}


def _swapped(x):
    return layout.swap_nibbles(x) if x.shape[-1] == 128 else x  # codes of 256 columns; scales have 16


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_seen(mutation, blackwell, stored_experts, monkeypatch):
    scheme, config = NVFP4("per_token"), MoeConfig(4, 2, 208, 208)

    def check():
        made = FlashInferTrtllmRouted(config, scheme, blackwell, torch.bfloat16)
        assert_matches(made, stored_experts(scheme, config, unequal=True), *tokens_of(config, 5))

    check()
    where, name, mutate = MUTATIONS[mutation]
    monkeypatch.setattr(where, name, mutate(getattr(where, name)))
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError, UnsupportedError)):
        check()
