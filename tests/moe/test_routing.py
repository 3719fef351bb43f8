"""Routers against transformers' own, and against the equations written out."""

import math

import pytest
import torch
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from rollmill.moe import MoeConfig, route

HIDDEN, EXPERTS, TOKENS = 32, 16, 64


def config(top_k: int, **fields) -> MoeConfig:
    return MoeConfig(EXPERTS, top_k, HIDDEN, 8, **fields)


def dense(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[num_tokens, num_experts]: the weight of every expert, in whatever order a router lists them."""
    return torch.zeros(len(ids), EXPERTS).scatter_(1, ids, weights.float())


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def seeded():
    """A router of transformers with random weights."""

    def make(router, spread: float = 0.5):
        generator = torch.Generator().manual_seed(1)
        torch.nn.init.normal_(router.weight, std=spread, generator=generator)
        return router.eval().requires_grad_(False)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 4, EXPERTS], ids=["top_1", "top_4", "all_experts"])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "as_is"])
def test_softmax_equals_qwen3_moe(renormalize, top_k, dtype, hidden, seeded):
    theirs = seeded(
        Qwen3MoeTopKRouter(
            Qwen3MoeConfig(
                hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=top_k, norm_topk_prob=renormalize
            )
        )
    ).to(dtype)
    logits, expected, expected_ids = theirs(hidden.to(dtype))
    ids, weights = route(logits, config(top_k, renormalize=renormalize))
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert torch.equal(ids, expected_ids)
    # transformers rounds the weights to the dtype of the logits; ours stay float32
    torch.testing.assert_close(weights.to(dtype), expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS], ids=["top_1", "top_2", "all_experts"])
def test_renormalized_softmax_equals_mixtral(top_k, hidden, seeded):
    theirs = seeded(
        MixtralTopKRouter(MixtralConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=top_k))
    )
    logits, expected, expected_ids = theirs(hidden)
    ids, weights = route(logits, config(top_k))
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "as_is"])
@pytest.mark.parametrize("bias", [0.0, 0.3, -1.5], ids=["no_bias", "mixed_bias", "negative_bias"])
@pytest.mark.parametrize(
    ("n_group", "topk_group", "top_k"),
    [(1, 1, 4), (1, 1, 1), (1, 1, EXPERTS), (4, 2, 4), (4, 1, 4), (8, 3, 6), (4, 4, EXPERTS)],
    ids=str,
)
def test_sigmoid_equals_deepseek_v3(n_group, topk_group, top_k, bias, renormalize, hidden, seeded):
    theirs = seeded(
        DeepseekV3TopkRouter(
            DeepseekV3Config(
                hidden_size=HIDDEN,
                n_routed_experts=EXPERTS,
                num_experts_per_tok=top_k,
                n_group=n_group,
                topk_group=topk_group,
                norm_topk_prob=renormalize,
                routed_scaling_factor=2.5,
            )
        )
    )
    noise = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(2)) * 0.3
    theirs.e_score_correction_bias.copy_(bias + (noise if bias else 0 * noise))
    logits, expected, expected_ids = theirs(hidden)
    ours = config(
        top_k,
        scoring="sigmoid",
        renormalize=renormalize,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=2.5,
    )
    ids, weights = route(logits, ours, theirs.e_score_correction_bias)
    torch.testing.assert_close(dense(ids, weights), dense(expected_ids, expected), rtol=1e-6, atol=0)


def test_softmax_written_out():
    logits = torch.tensor([[0.0, math.log(6.0), math.log(2.0), math.log(1.0)]])
    shape = MoeConfig(4, 2, HIDDEN, 8, renormalize=False)
    ids, weights = route(logits, shape)
    assert ids.tolist() == [[1, 2]]
    assert weights[0].tolist() == pytest.approx([0.6, 0.2])
    ids, weights = route(logits, MoeConfig(4, 2, HIDDEN, 8))
    assert weights[0].tolist() == pytest.approx([0.75, 0.25])


def test_bias_moves_the_choice_and_never_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    shape = MoeConfig(4, 2, HIDDEN, 8, scoring="sigmoid", renormalize=False)
    ids, weights = route(logits, shape, torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    assert sorted(ids[0].tolist()) == [1, 3]
    chosen = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert chosen[1] == pytest.approx(1 / (1 + math.exp(-1)))
    assert chosen[3] == pytest.approx(1 / (1 + math.exp(1)))


def test_groups_are_ranked_by_their_two_best_experts():
    """Group 0 has the best expert of all, group 1 the best pair."""
    logits = torch.tensor([[3.0, -9.0, -9.0, 1.5, 1.4, -9.0]])
    shape = MoeConfig(6, 2, HIDDEN, 8, scoring="sigmoid", n_group=2, topk_group=1)
    ids, weights = route(logits, shape)
    assert ids.tolist() == [[3, 4]]
    a, b = (1 / (1 + math.exp(-value)) for value in (1.5, 1.4))
    assert weights[0].tolist() == pytest.approx([a / (a + b), b / (a + b)])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_renormalized_weights_sum_to_the_scaling_factor(scoring, hidden):
    logits = hidden[:, :EXPERTS] * 20
    _, weights = route(logits, config(3, scoring=scoring, routed_scaling_factor=2.5))
    torch.testing.assert_close(weights.sum(-1), torch.full((TOKENS,), 2.5))


def test_sigmoids_that_all_vanish_give_finite_weights():
    _, weights = route(torch.full((2, EXPERTS), -200.0), config(2, scoring="sigmoid"))
    assert weights.tolist() == [[0.0, 0.0]] * 2


def test_no_tokens_are_routed_nowhere():
    ids, weights = route(torch.empty(0, EXPERTS), config(2))
    assert (ids.shape, weights.shape) == ((0, 2), (0, 2))


def test_routing_leaves_logits_and_bias_alone(hidden):
    logits, bias = hidden[:, :EXPERTS].clone(), torch.linspace(-1, 1, EXPERTS)
    kept, kept_bias = logits.clone(), bias.clone()
    route(logits, config(4, scoring="sigmoid", n_group=4, topk_group=2, routed_scaling_factor=2.0), bias)
    assert torch.equal(logits, kept)
    assert torch.equal(bias, kept_bias)
