"""Rank a quantized pool, compute the best and the worst again from the same noise."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import ConfigError, DiffusionParams, FlowSDE, RequestError, StaleVersionError

PARAMS = DiffusionParams(steps=3, height=32, width=32, solver=FlowSDE(), want=["latents", "logprobs"], init_seed=3)


@pytest.fixture
def engine(open_engine):
    return open_engine("flux", quant="nvfp4", dual="bf16", max_denoise_batch=4)


def mean_latent(samples):
    return [float(sample.latents[-1].mean()) for sample in samples]


def test_the_best_and_the_worst_come_back_in_bf16(engine, open_engine, make_embeds):
    embeds = [make_embeds("flux", seed=seed) for seed in range(2)]
    pools = []

    def reward(samples):
        pools.append(list(samples))
        return mean_latent(samples)

    found = engine.explore(embeds, reward=reward, pool=6, keep=(2, 1), params=PARAMS)
    assert [len(pool) for pool in pools] == [6, 6]
    plain = open_engine("flux")
    for index, (one, pool) in enumerate(zip(found, pools, strict=True)):
        order = sorted(range(6), key=lambda i: mean_latent(pool)[i], reverse=True)
        assert (list(one.best), list(one.worst)) == (order[:2], order[-1:])
        torch.testing.assert_close(one.rewards, torch.tensor(mean_latent(pool)))
        for place, kept in zip([*order[:2], order[-1]], one.samples, strict=True):
            assert kept.prompt_index == pool[place].prompt_index == index
            assert kept.seeds == pool[place].seeds
            assert torch.equal(kept.latents[0], pool[place].latents[0])
            assert kept.precisions == ["bf16"] * 3
            (expected,) = plain.replay([kept], precision="bf16")
            assert torch.equal(kept.latents, expected.latents)


def test_worst_ones_begin_with_the_worst_and_ties_go_by_place(engine, make_embeds):
    rewards = [1.0, 3.0, 1.0, 3.0, 0.0, 1.0]
    (found,) = engine.explore(make_embeds("flux"), reward=lambda _: rewards, pool=6, keep=(3, 3), params=PARAMS)
    assert found.best == [1, 3, 0]
    assert found.worst == [4, 5, 2]
    assert found.rewards.tolist() == rewards
    assert len({sample.seeds.init for sample in found.samples}) == 6


@pytest.mark.parametrize("keep", [(0, 2), (2, 0), (4, 0)])
def test_one_end_only(keep, engine, make_embeds):
    (found,) = engine.explore(make_embeds("flux"), reward=mean_latent, pool=4, keep=keep, params=PARAMS)
    assert (len(found.best), len(found.worst)) == keep
    assert len(found.samples) == sum(keep)


@pytest.mark.parametrize("rewards", [torch.arange(4.0), torch.arange(4), (0, 1, 2, 3)], ids=["floats", "ints", "tuple"])
def test_rewards_may_be_tensors(rewards, engine, make_embeds):
    (found,) = engine.explore(make_embeds("flux"), reward=lambda _: rewards, pool=4, keep=(1, 1), params=PARAMS)
    assert (found.best, found.worst) == ([3], [0])


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([1.0] * 3, r"shape \[3\] for 4 samples"),
        ([[1.0]] * 4, r"shape \[4, 1\]"),
        (1.0, r"shape \[\]"),
        ([1.0, float("nan"), 2.0, float("inf")], r"not finite for samples \[1, 3\]"),
        (["good"] * 4, "no numbers"),
        (None, "no numbers"),
    ],
    ids=str,
)
def test_bad_rewards(rewards, words, engine, make_embeds):
    with pytest.raises(RequestError, match=words):
        engine.explore(make_embeds("flux"), reward=lambda _: rewards, pool=4, keep=(1, 1), params=PARAMS)


@pytest.mark.parametrize("keep", [(0, 0), (-1, 2), (3, 2)])
def test_keep_is_a_part_of_the_pool(keep, engine, make_embeds):
    with pytest.raises(RequestError, match="pool of 4"):
        engine.explore(make_embeds("flux"), reward=mean_latent, pool=4, keep=keep, params=PARAMS)


def test_a_precision_that_is_not_there_is_refused_before_the_pool(open_engine, make_embeds):
    engine, asked = open_engine("flux", quant="fp8"), []
    with pytest.raises(ConfigError, match="dual='bf16'"):
        engine.explore(make_embeds("flux"), reward=asked.append, pool=4, keep=(1, 1), params=PARAMS)
    assert not asked
    (found,) = engine.explore(
        make_embeds("flux"), reward=mean_latent, pool=4, keep=(1, 1), params=PARAMS, precision={"window": "weight_only"}
    )
    assert found.samples[0].precisions == ["weight_only"] * 3


def test_a_swap_between_pool_and_replay_is_told(engine, make_embeds, transformer_folder):
    """Rewards of one policy rank no samples of another."""

    def swap_meanwhile(samples):
        engine.update_weights(transformer_folder("flux", seed=1), version="2")
        return mean_latent(samples)

    with pytest.raises(StaleVersionError, match="version 'initial'.*'2'"):
        engine.explore(make_embeds("flux"), reward=swap_meanwhile, pool=4, keep=(1, 1), params=PARAMS)


def test_a_swap_after_the_last_replay_is_no_harm(engine, make_embeds, transformer_folder):
    engine.update_weights(transformer_folder("flux", seed=1), version="2")
    (found,) = engine.explore(make_embeds("flux"), reward=mean_latent, pool=4, keep=(1, 1), params=PARAMS)
    assert {sample.weight_version for sample in found.samples} == {"2"}
