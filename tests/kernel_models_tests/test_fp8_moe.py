"""The FP8 forms of the fused MoE through FlashInfer's functions, against a loop over tokens and choices in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_models.library import ModelLibrary
from torch import Tensor

pytest.importorskip("flashinfer", reason="flashinfer is not installed")
from flashinfer.fused_moe import core  # noqa: E402
from flashinfer.tllm_enums import ActivationType, RoutingMethodType  # noqa: E402

EXPERTS, TOKENS, TOP_K, HIDDEN, INTERMEDIATE = 4, 5, 2, 256, 128
PER_TENSOR = "trtllm_fp8_per_tensor_scale"
PER_CHANNEL = "trtllm_fp8_per_channel_scale"


def entry(name: str) -> Any:
    """A function of the library, taken when it is called: a test's patch is in place by then."""
    if not hasattr(core, name):
        pytest.skip(f"this version has no {name}")
    return getattr(core, name)


def to_fp8(x: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(E4M3, decode scale over `dim`)."""
    scale = x.abs().amax(dim=dim, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def shuffle(tensor: Tensor, gated: bool) -> Tensor:
    """FlashInfer's own row order, expert by expert; scales of rows go along."""
    rows = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    find = core._maybe_get_cached_w3_w1_permute_indices if gated else core.get_w2_permute_indices_with_cache
    indices = find({}, torch.zeros(tensor.shape[1], HIDDEN, dtype=torch.uint8), 128)
    return rows[:, indices].contiguous().view(tensor.dtype)


def shared(**changes: Any) -> dict[str, Any]:
    same = dict.fromkeys(["routing_bias", "n_group", "topk_group", "routed_scaling_factor"])
    sizes = {"num_experts": EXPERTS, "local_num_experts": EXPERTS, "local_expert_offset": 0, "top_k": TOP_K}
    same |= {**sizes, "intermediate_size": INTERMEDIATE, "use_routing_scales_on_input": False}
    same |= {"routing_method_type": RoutingMethodType.Renormalize, "activation_type": ActivationType.Swiglu}
    return {**same, **changes}


@pytest.fixture
def routing() -> tuple[Tensor, Tensor, Tensor]:
    """logits, and what TopK -> Softmax makes of them: ids, BF16 weights."""
    logits = torch.randn(TOKENS, EXPERTS)
    top = logits.topk(TOP_K)
    return logits, top.indices, top.values.softmax(-1).bfloat16()


def packed(ids: Tensor, weights: Tensor) -> Tensor:
    return (ids.int() << 16) | (weights.view(torch.int16).int() & 0xFFFF)


def by_hand(x: Tensor, w13: Tensor, w2: Tensor, routing: Any, requantize: Callable[[Tensor], Tensor]) -> Tensor:
    """Real values in float64; `requantize` is what happens to the activation between the GEMMs."""
    _, ids, weights = routing
    out = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token, chosen in enumerate(ids.tolist()):
        for slot, expert in enumerate(chosen):
            up, gate = (w13[expert] @ x[token]).chunk(2)
            value = w2[expert] @ requantize(up * gate / (1 + (-gate).exp()))
            out[token] += value.bfloat16().double() * weights[token, slot].double()
    return out


@pytest.fixture
def per_tensor(routing: tuple[Tensor, Tensor, Tensor]) -> tuple[dict[str, Any], Tensor]:
    x, x_scale = to_fp8(torch.randn(TOKENS, HIDDEN), (0, 1))
    w13, s13 = to_fp8(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / 16, (1, 2))
    w2, s2 = to_fp8(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / 16, (1, 2))
    inner = torch.tensor(0.01)  # the activation's static decode scale
    call = shared(
        hidden_states=x,
        gemm1_weights=shuffle(w13, gated=True),
        output1_scales_scalar=(x_scale * s13 / inner).flatten(),
        output1_scales_gate_scalar=(x_scale * s13).flatten(),
        gemm2_weights=shuffle(w2, gated=False),
        output2_scales_scalar=(inner * s2).flatten(),
    )

    def requantize(activation: Tensor) -> Tensor:
        scaled = (activation / inner).float().clamp(-448, 448)
        return scaled.to(torch.float8_e4m3fn).double() * inner

    values = [(x.double() * x_scale), w13.double() * s13, w2.double() * s2]
    return call, by_hand(*values, routing, requantize)


@pytest.fixture
def per_channel(routing: tuple[Tensor, Tensor, Tensor]) -> tuple[dict[str, Any], Tensor]:
    x, x_scale = to_fp8(torch.randn(TOKENS, HIDDEN), (1,))
    w13, s13 = to_fp8(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / 16, (2,))
    w2, s2 = to_fp8(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / 16, (2,))
    call = shared(
        hidden_states=x,
        hidden_states_scale=x_scale,
        gemm1_weights=shuffle(w13, gated=True),
        gemm1_per_channel_weight_scale=shuffle(s13[..., 0], gated=True),
        output1_scale_scalar=torch.ones(EXPERTS),
        output1_scale_gate_scalar=torch.ones(EXPERTS),
        gemm2_weights=shuffle(w2, gated=False),
        gemm2_per_channel_weight_scale=shuffle(s2[..., 0], gated=False),
        output2_scale_scalar=torch.ones(EXPERTS),
    )

    def requantize(activation: Tensor) -> Tensor:
        row = activation.bfloat16().float()
        scale = row.abs().amax() / 448
        return (row * (448 / row.abs().amax())).to(torch.float8_e4m3fn).double() * scale

    values = [x.double() * x_scale, w13.double() * s13, w2.double() * s2]
    return call, by_hand(*values, routing, requantize)


def first(result: Any) -> Tensor:
    """Some of these functions return a tensor, some a list of one."""
    return result if isinstance(result, Tensor) else result[0]


def assert_close_to(out: Tensor, expected: Tensor) -> None:
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("family", [PER_TENSOR, PER_CHANNEL])
def test_fp8_experts(
    model_library: ModelLibrary, request: pytest.FixtureRequest, routing: Any, family: str, routed: bool
) -> None:
    name = f"{family}_routed_moe" if routed else f"{family}_moe"
    run = entry(name)
    call, expected = request.getfixturevalue("per_tensor" if family == PER_TENSOR else "per_channel")
    route = {"topk_ids": packed(*routing[1:])} if routed else {"routing_logits": routing[0]}
    assert_close_to(first(run(**route, **call)), expected)
    assert [recorded for recorded, _ in model_library.calls] == [name]


def test_ids_and_weights_in_two_tensors(model_library: ModelLibrary, per_tensor: Any, routing: Any) -> None:
    call, expected = per_tensor
    run = entry(f"{PER_TENSOR}_routed_moe")
    assert_close_to(first(run(topk_ids=(routing[1].int(), routing[2].float()), **call)), expected)


def test_routing_replay(model_library: ModelLibrary, per_tensor: Any, routing: Any) -> None:
    call, _ = per_tensor
    replay = torch.zeros(TOKENS, TOP_K, dtype=torch.int16)
    entry(f"{PER_TENSOR}_moe")(routing_logits=routing[0], routing_replay_out=replay, **call)
    assert torch.equal(replay.long(), routing[1])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("hidden_states_scale", lambda t: t[:, 0], "hidden_states_scale"),
        ("gemm1_per_channel_weight_scale", lambda t: t[:, :, None], "gemm1_weights_scale"),
        ("gemm2_per_channel_weight_scale", lambda t: t.bfloat16(), "gemm2_weights_scale"),
        ("gemm1_weights", lambda t: t.view(torch.uint8), "gemm1_weights"),
        ("output2_scale_scalar", lambda t: t[:1], "output2_scale"),
    ],
)
def test_broken_contracts_are_refused(
    model_library: ModelLibrary, per_channel: Any, routing: Any, name: str, change: Any, reason: str
) -> None:
    call, _ = per_channel
    call[name] = change(call[name])
    with pytest.raises((ValueError, TypeError), match=reason):
        entry(f"{PER_CHANNEL}_moe")(routing_logits=routing[0], **call)


@pytest.mark.parametrize("mutation", ["gate and up exchanged", "channel scales unshuffled", "gate scalar for up"])
def test_a_wrong_layout_changes_the_result(
    model_library: ModelLibrary, per_channel: Any, routing: Any, mutation: str
) -> None:
    call, expected = per_channel
    run = entry(f"{PER_CHANNEL}_moe")
    if mutation == "gate and up exchanged":
        call["gemm1_weights"] = call["gemm1_weights"].view(torch.uint8).roll(16, dims=1).view(torch.float8_e4m3fn)
    elif mutation == "channel scales unshuffled":
        call["gemm1_per_channel_weight_scale"] = call["gemm1_per_channel_weight_scale"].sort(dim=1).values
    else:
        call["output1_scale_gate_scalar"] = torch.full((EXPERTS,), 0.5)
    out = first(run(routing_logits=routing[0], **call))
    assert (out.double() - expected).norm() / expected.norm() > 0.02
