"""Routed experts against transformers' own layer, and against a fake-quantizing loop over tokens."""

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from rollmill.moe import MoeConfig, RoutedExperts
from rollmill.quant import BF16, FP8, NVFP4, AmaxMeter, UnsupportedError, WeightShape, find_capability

CPU = find_capability("cpu")
EXPERTS, HIDDEN, INNER, TOKENS = 5, 64, 48, 12

ROUTINGS = {
    "top_1": lambda g: torch.randint(EXPERTS, (TOKENS, 1), generator=g),
    "top_2": lambda g: torch.stack([torch.randperm(EXPERTS, generator=g)[:2] for _ in range(TOKENS)]),
    "all_experts": lambda g: torch.stack([torch.randperm(EXPERTS, generator=g) for _ in range(TOKENS)]),
    "experts_without_tokens": lambda g: torch.tensor([[3, 1]] * TOKENS),
    "one_token_apart": lambda g: torch.tensor([[0, 1]] * (TOKENS - 1) + [[4, 2]]),
}
SCHEMES = [
    FP8(activation="static"),
    FP8(activation="per_token"),
    FP8(activation="none"),
    FP8(activation="per_token", per_channel=True),
    NVFP4(activation="static"),
    NVFP4(activation="per_token"),
    NVFP4(activation="none"),
]


def scheme_id(scheme) -> str:
    return f"{scheme.name}{'_channel' if getattr(scheme, 'per_channel', False) else ''}-{scheme.activation}"


@pytest.fixture
def experts():
    def make(scheme, top_k, *, dtype=torch.float32, kernel="auto") -> RoutedExperts:
        config = MoeConfig(EXPERTS, top_k, HIDDEN, INNER)
        names = ("gate_proj", "up_proj", "down_proj")
        return RoutedExperts("mlp.experts", names, config, scheme, capability=CPU, dtype=dtype, linear_kernel=kernel)

    return make


@pytest.fixture(params=ROUTINGS)
def routed(request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [num_tokens, hidden_size], ids and weights [num_tokens, top_k]."""
    generator = torch.Generator().manual_seed(3)
    ids = ROUTINGS[request.param](generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    x[:, 7] *= 10
    return x, ids, torch.rand(ids.shape, generator=generator) + 0.1


@pytest.fixture(scope="module")
def hf_experts(bf16_experts):
    """transformers' layer on the same weights; "eager" is its plain loop."""

    def make(dtype: torch.dtype) -> Qwen3MoeExperts:
        config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS)
        config._experts_implementation = "eager"
        layer = Qwen3MoeExperts(config).requires_grad_(False)
        gate_up, down = bf16_experts(EXPERTS, INNER, HIDDEN)
        layer.load_state_dict({"gate_up_proj": gate_up, "down_proj": down})
        return layer.to(dtype)

    return make


def test_bf16_weights_in_float32_equal_transformers(routed, experts, stored_experts, hf_experts, fill):
    x, ids, weights = routed
    ours = experts(BF16, ids.shape[1])
    fill(ours, *stored_experts(ours, EXPERTS, INNER, HIDDEN))
    expected = hf_experts(torch.float32)(x, ids, weights)
    torch.testing.assert_close(ours(x, ids, weights), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_bf16_weights_in_bfloat16_are_as_near_as_transformers(routed, experts, stored_experts, hf_experts, fill):
    x, ids, weights = routed
    ours = experts(BF16, ids.shape[1], dtype=torch.bfloat16)
    fill(ours, *stored_experts(ours, EXPERTS, INNER, HIDDEN))
    exact = hf_experts(torch.float64)(x.bfloat16().double(), ids, weights.double())
    theirs = hf_experts(torch.bfloat16)(x.bfloat16(), ids, weights.bfloat16())
    out = ours(x.bfloat16(), ids, weights)
    assert out.dtype == torch.bfloat16
    error, their_error = (out.double() - exact).norm(), (theirs.double() - exact).norm()
    assert error < 0.005 * exact.norm()
    assert error < 1.05 * their_error


@pytest.mark.parametrize("kernel", ["exact", "reference"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_quantized_experts_equal_the_fake_quantized_loop(
    scheme, kernel, routed, experts, stored_experts, expert_loop, fill
):
    x, ids, weights = routed
    ours = experts(scheme, ids.shape[1], kernel=kernel)
    w13, w2 = stored_experts(ours, EXPERTS, INNER, HIDDEN)
    fill(ours, w13, w2)
    expected = expert_loop(x, ids, weights, scheme, w13, w2)
    atol = 2e-6 * expected.abs().max().item()  # what float32 sums lose; a flipped code would cost a hundred times that
    torch.testing.assert_close(ours(x, ids, weights).double(), expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("kernel", ["torch_fp8", "reference"])
@pytest.mark.parametrize("scheme", [FP8(activation="static"), FP8(activation="per_token")], ids=scheme_id)
def test_quantized_experts_in_bfloat16_are_within_its_rounding(
    scheme, kernel, experts, stored_experts, expert_loop, fill
):
    generator = torch.Generator().manual_seed(3)
    ids, x = ROUTINGS["top_2"](generator), torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    weights = torch.rand(ids.shape, generator=generator)
    ours = experts(scheme, 2, dtype=torch.bfloat16, kernel=kernel)
    w13, w2 = stored_experts(ours, EXPERTS, INNER, HIDDEN)
    if "input_scale" in w13:  # torch_fp8 quantizes its input once
        w13["input_scale"] = w13["input_scale"][:, :1].expand(-1, 2).contiguous()
    fill(ours, w13, w2)
    expected = expert_loop(x, ids, weights, scheme, w13, w2)
    assert (ours(x, ids, weights).double() - expected).norm() < 2**-8 * expected.norm()


def test_an_unused_expert_may_hold_anything(experts, stored_experts, fill):
    """Tokens of experts 1 and 3 never meet the NaN of the others."""
    ours = experts(BF16, 2)
    w13, w2 = stored_experts(ours, EXPERTS, INNER, HIDDEN)
    x, ids = torch.randn(TOKENS, HIDDEN), torch.tensor([[3, 1]] * TOKENS)
    weights = torch.full((TOKENS, 2), 0.5)
    fill(ours, w13, w2)
    expected = ours(x, ids, weights)
    for stored in (w13, w2):
        stored["weight"][[0, 2, 4]] = float("nan")
    fill(ours, w13, w2)
    assert torch.equal(ours(x, ids, weights), expected)


@pytest.mark.parametrize("scheme", [BF16, FP8(), NVFP4()], ids=scheme_id)
def test_no_tokens_give_no_rows(scheme, experts, stored_experts, fill):
    ours = experts(scheme, 2)
    fill(ours, *stored_experts(ours, EXPERTS, INNER, HIDDEN))
    out = ours(torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert out.shape == (0, HIDDEN)


def test_the_order_of_choices_does_not_matter(experts, stored_experts, fill):
    ours = experts(BF16, 2)
    fill(ours, *stored_experts(ours, EXPERTS, INNER, HIDDEN))
    generator = torch.Generator().manual_seed(5)
    x, ids = torch.randn(TOKENS, HIDDEN, generator=generator), ROUTINGS["top_2"](generator)
    weights = torch.rand(ids.shape, generator=generator)
    assert torch.equal(ours(x, ids, weights), ours(x, ids.flip(1), weights.flip(1)))


def test_inputs_are_left_alone(experts, stored_experts, fill):
    ours = experts(NVFP4(), 2)
    fill(ours, *stored_experts(ours, EXPERTS, INNER, HIDDEN))
    x, ids, weights = torch.randn(TOKENS, HIDDEN), torch.tensor([[3, 1]] * TOKENS), torch.full((TOKENS, 2), 0.5)
    kept = x.clone(), ids.clone(), weights.clone()
    ours(x, ids, weights)
    assert all(torch.equal(a, b) for a, b in zip((x, ids, weights), kept, strict=True))


def test_slots_carry_the_checkpoints_names(experts):
    ours = experts(NVFP4(), 2)
    w13, w2 = ours.slots
    assert (w13.name, w2.name) == ("mlp.experts.w13", "mlp.experts.w2")
    assert w13.modules == tuple((f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj") for e in range(EXPERTS))
    assert w2.modules == tuple((f"mlp.experts.{e}.down_proj",) for e in range(EXPERTS))
    assert (w13.fused, w2.fused) == (("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",))


@pytest.mark.parametrize("scheme", [BF16, FP8(), NVFP4()], ids=scheme_id)
def test_slots_have_the_stacked_shapes(scheme, experts):
    w13, w2 = experts(scheme, 2).slots
    assert w13.shape == WeightShape((INNER, INNER), HIDDEN, units=EXPERTS, one_scale=True)
    assert w2.shape == WeightShape((HIDDEN,), INNER, units=EXPERTS)
    assert w13.matrices == scheme.matrices(w13.shape)
    assert all(len(tensor) == EXPERTS for slot in (w13, w2) for tensor in slot.tensors.values())


@pytest.mark.parametrize("linear_kernel", ["torch_fp8", "bf16", "marlin"])
def test_a_linear_kernel_that_cannot_is_refused(linear_kernel, experts):
    with pytest.raises(UnsupportedError, match=linear_kernel):
        experts(NVFP4(), 2, kernel=linear_kernel)


def test_meters_see_what_enters_both_stacks(experts, routed, bf16_experts, fill):
    """Amax over all experts of a layer: w13 of the tokens, w2 of silu(gate) * up for every (token, choice)."""
    x, ids, weights = routed
    layer, (gate_up, down) = experts(BF16, ids.shape[1]), bf16_experts(EXPERTS, INNER, HIDDEN)
    fill(layer, {"weight": gate_up}, {"weight": down})
    for slot in layer.slots:
        slot.meter = AmaxMeter(torch.device("cpu"))
    layer(x, ids, weights)
    pairs = [(x[token], gate_up[expert].float()) for token, row in enumerate(ids.tolist()) for expert in row]
    inner = [torch.nn.functional.silu(w[:INNER] @ token) * (w[INNER:] @ token) for token, w in pairs]
    assert layer.w13.meter.amax == x.abs().max()
    assert layer.w2.meter.amax.item() == pytest.approx(max(h.abs().max().item() for h in inner), rel=1e-5)


def test_clipping_counts_every_pair_that_enters_w2(experts, routed, stored_experts, fill):
    x, ids, weights = routed
    layer = experts(FP8(activation="static"), ids.shape[1])
    fill(layer, *stored_experts(layer, EXPERTS, INNER, HIDDEN))
    layer(x, ids, weights)
    assert layer.w13.meter.counts.tolist() == [(abs(x) > 3.0).sum(), x.numel()]  # 3.0: the smallest scale's limit
    assert layer.w2.meter.counts[1] == ids.numel() * INNER
