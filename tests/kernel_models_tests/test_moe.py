"""The fused MoE through FlashInfer's functions, against a loop over tokens and choices in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_models.library import ModelLibrary
from kernel_models.moe import decode_blocks
from kernel_models.quantizers import quantize_nvfp4, quantize_nvfp4_per_token
from torch import Tensor

flashinfer = pytest.importorskip("flashinfer", reason="flashinfer is not installed")
from flashinfer.fused_moe import RoutingMethodType  # noqa: E402
from flashinfer.tllm_enums import ActivationType, SfLayout  # noqa: E402

TOKENS, TOP_K = 6, 2
Quantize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
routed = flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe
DECLARED = "hidden_states_scale_layout" in inspect.signature(routed).parameters
PAIRS = "Tuple" in str(inspect.signature(routed).parameters["topk_ids"].annotation)


def pack(ids: Tensor, weights: Tensor) -> Tensor:
    return (ids.int() << 16) | (weights.bfloat16().view(torch.int16).int() & 0xFFFF)


def rest(**changes: Any) -> dict[str, Any]:
    """The arguments that no test here varies."""
    same = {
        "routing_bias": None,
        "top_k": TOP_K,
        "n_group": None,
        "topk_group": None,
        "local_expert_offset": 0,
        "routed_scaling_factor": None,
        "routing_method_type": RoutingMethodType.Renormalize,
        "activation_type": ActivationType.Swiglu,
    }
    return {**same, **changes}


def fp4_rest(**changes: Any) -> dict[str, Any]:
    absent = dict.fromkeys(["gemm1_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm2_bias"])
    layout = {"hidden_states_scale_layout": SfLayout.layout_linear} if DECLARED else {}
    return rest(**{**absent, **layout, **changes})


@pytest.fixture
def routing() -> tuple[Tensor, Tensor]:
    """ids, BF16 weights [TOKENS, TOP_K]; expert 3 gets no token."""
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1], [1, 0]])
    return ids, torch.rand(TOKENS, TOP_K).bfloat16()


def by_hand(experts: Any, x: Tensor, ids: Tensor, weights: Tensor, row_scale: Tensor | None) -> Tensor:
    """[T, H] float64: one token and choice at a time; only the inner quantization is shared with the model."""
    scalars = [
        experts.arguments[f"output{name}"].double()
        for name in ("1_scale_scalar", "1_scale_gate_scalar", "2_scale_scalar")
    ]
    out = torch.zeros(x.shape[0], experts.down.shape[1], dtype=torch.float64)
    for token, chosen in enumerate(ids.tolist()):
        for slot, expert in enumerate(chosen):
            factor = 1.0 if row_scale is None else float(row_scale[token])
            up = experts.up[expert].double() @ x[token].double() * factor * scalars[0][expert]
            gate = experts.gate[expert].double() @ x[token].double() * factor * scalars[1][expert]
            inner = (up * gate / (1 + (-gate).exp())).float()[None]
            if row_scale is None:
                codes, blocks = quantize_nvfp4(inner, torch.ones(1))
                row = 1.0
            else:
                codes, blocks, scale = quantize_nvfp4_per_token(inner.bfloat16(), 1 / 2688)
                row = float(scale)
            value = experts.down[expert].double() @ decode_blocks(codes, blocks)[0].double() * row * scalars[2][expert]
            out[token] += value.float().bfloat16().double() * weights[token, slot].double()
    return out


@pytest.fixture
def fp4_call(
    fp4_experts: Callable[..., Any], nvfp4: Quantize, routing: tuple[Tensor, Tensor]
) -> Callable[..., tuple[dict[str, Any], Tensor]]:
    """`fp4_call(per_token)`: arguments of the routed function, and the result by hand."""

    def make(per_token: bool = False) -> tuple[dict[str, Any], Tensor]:
        experts, (ids, weights) = fp4_experts(), routing
        codes, scales, x = nvfp4(torch.randn(TOKENS, 256))
        row_scale = torch.rand(TOKENS) + 0.5 if per_token else None
        call = {
            "topk_ids": pack(ids, weights),
            "hidden_states": codes,
            "hidden_states_scale": scales.view(torch.float8_e4m3fn),
            "per_token_scale": row_scale,
        }
        return {**experts.arguments, **fp4_rest(**call)}, by_hand(experts, x, ids, weights, row_scale)

    return make


def assert_close_to(out: Tensor, expected: Tensor) -> None:
    """A rounding flip in the inner quantization moves single elements: the norm is held, tightly."""
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("per_token", [False, True])
def test_nvfp4_experts(model_library: ModelLibrary, fp4_call: Callable[..., Any], per_token: bool) -> None:
    call, expected = fp4_call(per_token)
    (out,) = flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call)
    assert_close_to(out, expected)
    assert model_library.calls[-1][0] == "trtllm_fp4_block_scale_routed_moe"


def test_ids_and_weights_in_two_tensors(
    model_library: ModelLibrary, fp4_call: Callable[..., Any], routing: tuple[Tensor, Tensor]
) -> None:
    call, expected = fp4_call()
    call["topk_ids"] = (routing[0].int(), routing[1].float())
    if not PAIRS:
        with pytest.raises((TypeError, ValueError, AttributeError, AssertionError)):
            flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call)
        return
    (out,) = flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call)
    assert_close_to(out, expected)


def test_a_given_output_is_written(model_library: ModelLibrary, fp4_call: Callable[..., Any]) -> None:
    call, expected = fp4_call()
    output = torch.full((TOKENS, 200), 7.0, dtype=torch.bfloat16)
    flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call, output=output)
    assert_close_to(output, expected[:, :200])


def test_experts_of_another_rank_are_skipped(
    model_library: ModelLibrary, fp4_call: Callable[..., Any], routing: tuple[Tensor, Tensor]
) -> None:
    call, _ = fp4_call()
    halves = []
    for offset in (0, 2):
        mine = {
            name: value[offset : offset + 2]
            for name, value in call.items()
            if name.startswith(("gemm", "output")) and value is not None
        }
        halves.append(
            flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(
                **{**call, **mine, "local_expert_offset": offset, "local_num_experts": 2}
            )[0].float()
        )
    whole = flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call)[0].float()
    sizes = halves[0].abs() + halves[1].abs()  # each half and the whole are rounded to BF16
    assert bool(((halves[0] + halves[1] - whole).abs() <= 2**-7 * sizes).all())
    assert halves[0].norm() > 0
    assert halves[1].norm() > 0


@pytest.mark.parametrize(
    "mutation", ["nibbles", "gate and up exchanged", "linear scales", "gate scalar for up", "off by one", "no reorder"]
)
def test_a_wrong_layout_changes_the_result(
    model_library: ModelLibrary, fp4_call: Callable[..., Any], mutation: str
) -> None:
    call, expected = fp4_call()
    w13, blocks = call["gemm1_weights"], call["gemm1_weights_scale"].view(torch.uint8)
    rows = torch.arange(w13.shape[1])
    if mutation == "nibbles":
        call["gemm1_weights"] = (w13 >> 4) | (w13 << 4)
    elif mutation == "gate and up exchanged":
        exchanged = (rows // 8 ^ 1 << 1) * 8 + rows % 8  # x0 and x1 rows are 16 apart within a block of 32
        call["gemm1_weights"] = w13[:, exchanged].contiguous()
    elif mutation == "linear scales":
        call["gemm1_weights_scale"] = torch.stack([unswizzle(b) for b in blocks]).view(torch.float8_e4m3fn)
    elif mutation == "gate scalar for up":
        call["output1_scale_scalar"] = call["output1_scale_gate_scalar"]
    elif mutation == "off by one":
        call["gemm1_weights"] = w13.roll(1, dims=1)
    else:
        call["gemm2_weights"] = call["gemm2_weights"].flip(1)
    (out,) = flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call)
    assert (out.double() - expected).norm() / expected.norm() > 0.05


def unswizzle(blocks: Tensor) -> Tensor:
    rows, columns = blocks.shape
    return blocks.view(rows // 128, columns // 4, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, columns)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("hidden_states_scale", lambda t: t.view(torch.uint8), "scale"),
        ("topk_ids", lambda t: t.long(), "int32"),
        ("topk_ids", lambda t: t + (4 << 16), "out of range"),
        ("topk_ids", lambda t: t[:, :1].contiguous(), "topk_ids"),
        ("gemm1_weights", lambda t: t[:, :128].contiguous(), "gemm1_weights"),
        ("gemm1_weights", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
        (
            "gemm2_weights_scale",
            lambda t: t.view(torch.uint8)[:, :, :6].contiguous().view(torch.float8_e4m3fn),
            "scale",
        ),
        ("output1_scale_scalar", lambda t: t[:1], "output1_scale"),
        ("output1_scale_gate_scalar", lambda t: None, "output1_gate_scale"),
        ("output2_scale_scalar", lambda t: t.double(), "output2_scale"),
        ("output2_scale_scalar", lambda t: 1.0, "kernel reads a tensor"),
        ("routing_method_type", lambda t: 1, "RoutingMethodType"),
        ("routing_method_type", lambda t: RoutingMethodType.Unspecified, "Unspecified"),
        ("activation_type", lambda t: 3, "ActivationType"),
        ("per_token_scale", lambda t: torch.ones(TOKENS, 1), "per_token_scale"),
        ("top_k", lambda t: 9, "top_k"),
    ],
)
def test_broken_contracts_are_refused(
    model_library: ModelLibrary, fp4_call: Callable[..., Any], name: str, change: Callable[[Any], Any], reason: str
) -> None:
    call, _ = fp4_call()
    call[name] = change(call[name])
    with pytest.raises((ValueError, TypeError, AssertionError), match=reason):
        flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call)


def test_no_tokens_are_refused(model_library: ModelLibrary, fp4_call: Callable[..., Any]) -> None:
    call, _ = fp4_call()
    for name in ("topk_ids", "hidden_states", "hidden_states_scale"):
        call[name] = call[name][:0]
    with pytest.raises((ValueError, ZeroDivisionError)):
        flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call)


@pytest.mark.skipif(not DECLARED, reason="this version asks for no layout")
@pytest.mark.parametrize("layout", [None, SfLayout.layout_128x4])
def test_scales_must_be_declared_linear(model_library: ModelLibrary, fp4_call: Callable[..., Any], layout: Any) -> None:
    call, _ = fp4_call()
    with pytest.raises((ValueError, NotImplementedError), match="hidden_states_scale_layout"):
        flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**{**call, "hidden_states_scale_layout": layout})


def test_no_moe_below_blackwell(fp4_call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    call, _ = fp4_call()
    monkeypatch.undo()
    ModelLibrary(sm=90).install(monkeypatch)
    with pytest.raises(ValueError, match="sm90"):
        flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call)


METHODS = {
    "Default": lambda z: z.softmax(-1).topk(TOP_K),
    "Renormalize": lambda z: (z.topk(TOP_K).values.softmax(-1), z.topk(TOP_K).indices),
    "RenormalizeNaive": lambda z: (z.topk(TOP_K).values.softmax(-1), z.topk(TOP_K).indices),
    "SigmoidRenorm": lambda z: (
        z.sigmoid().topk(TOP_K).values / z.sigmoid().topk(TOP_K).values.sum(-1, keepdim=True),
        z.topk(TOP_K).indices,
    ),
}


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_in_the_kernel(
    model_library: ModelLibrary, fp4_call: Callable[..., Any], method: str, dtype: torch.dtype
) -> None:
    call, _ = fp4_call()
    logits = torch.stack([torch.randperm(4) - 1.5 for _ in range(TOKENS)]).to(dtype)  # ties are anybody's
    weights, ids = METHODS[method](logits.float())
    replay = torch.full((TOKENS + 2, TOP_K), -7, dtype=torch.int16)
    del call["topk_ids"]
    call |= {"routing_logits": logits, "routing_method_type": RoutingMethodType[method], "routing_replay_out": replay}
    (out,) = flashinfer.fused_moe.trtllm_fp4_block_scale_moe(**call)
    assert torch.equal(replay[:TOKENS].long(), ids)
    assert (replay[TOKENS:] == -7).all()
    for name in ("routing_logits", "routing_replay_out"):
        del call[name]
    (same,) = flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call, topk_ids=pack(ids, weights))
    assert torch.equal(out, same)


def test_deepseek_groups(model_library: ModelLibrary, fp4_call: Callable[..., Any]) -> None:
    """Two groups of two, one allowed: the group of the two best biased scores, weights without the bias."""
    call, _ = fp4_call()
    logits = torch.randn(TOKENS, 4)
    bias = torch.tensor([0.0, 0.5, 0.25, 0.0])
    keys = logits.sigmoid() + bias
    group = (keys[:, 2:].sum(1) > keys[:, :2].sum(1)).long()
    ids = torch.stack([group * 2, group * 2 + 1], dim=1)
    ids = ids.gather(1, keys.gather(1, ids).argsort(descending=True))
    weights = logits.sigmoid().gather(1, ids)
    weights = weights / weights.sum(1, keepdim=True) * 2.5
    del call["topk_ids"]
    deepseek = {"routing_method_type": RoutingMethodType.DeepSeekV3, "n_group": 2, "topk_group": 1}
    deepseek |= {"routed_scaling_factor": 2.5, "routing_bias": bias}
    (out,) = flashinfer.fused_moe.trtllm_fp4_block_scale_moe(routing_logits=logits, **{**call, **deepseek})
    (same,) = flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe(**call, topk_ids=pack(ids, weights))
    torch.testing.assert_close(out, same, rtol=0.01, atol=0.01)


def test_faults_strike_one_tactic(model_library: ModelLibrary, fp4_call: Callable[..., Any]) -> None:
    call, expected = fp4_call()
    op = "flashinfer::trtllm_fp4_block_scale_moe"
    run = flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe
    model_library.milliseconds[(op, (8, 1))] = 0.5
    with flashinfer.autotune(True):
        assert_close_to(run(**call, tune_max_num_tokens=8)[0], expected)
    assert {tuple(tactic) for _, tactic, _ in model_library.profiled if tactic != -1} == {(8, 0), (8, 1), (16, 0)}
    model_library.faults.add(op, "nan", tactic=[8, 1])
    assert run(**call, tune_max_num_tokens=8)[0].isnan().sum() == 1
    model_library.faults.clear()
    model_library.faults.add(op, "nan", tactic=[8, 0])
    assert not run(**call, tune_max_num_tokens=8)[0].isnan().any()
