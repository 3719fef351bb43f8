"""Prefix hits, chunks, preemption change nothing: tokens, log-probs and experts are transformers'."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import SamplingParams

FAMILIES = ["llama", "mistral-window", "gemma2", "deepseek_v3", "gpt_oss"]
WAYS = {
    "plain": {},
    "one-by-one": {"max_batch_size": 1, "kv_cache_tokens": 400},
    "chunks": {"max_batch_size": 4, "max_step_tokens": 4},
    "chunks-of-one": {"max_batch_size": 1, "max_step_tokens": 1, "kv_cache_tokens": 400},
    "preemption": {"kv_cache_tokens": 80},
    "preemption-in-chunks": {"kv_cache_tokens": 64, "max_batch_size": 4, "max_step_tokens": 20},
    "no-prefix-cache": {"prefix_cache": False},
    "preemption-without-prefix-cache": {"prefix_cache": False, "kv_cache_tokens": 80},
}
COMMON_WAYS = ["plain", "chunks", "preemption-in-chunks"]
GREEDY = SamplingParams(temperature=0, max_new_tokens=14)


@torch.no_grad()
def judge(model, outs):
    """Every token is the best of transformers' logits over the whole sequence, and every log-prob is theirs."""
    for out in outs:
        ids, start = out.prompt_token_ids + out.token_ids, len(out.prompt_token_ids)
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        chosen = torch.tensor(out.token_ids)[:, None]
        assert (logits.max(-1).values - logits.gather(-1, chosen)[:, 0]).max() < 1e-4
        torch.testing.assert_close(out.logprobs, logits.log_softmax(-1).gather(-1, chosen)[:, 0], rtol=0, atol=1e-4)


def judge_experts(model, outs):
    """Every row holds top_k distinct experts, those of a re-run of transformers' routers."""
    for out in outs:
        theirs = routed_by_transformers(model, (out.prompt_token_ids + out.token_ids)[:-1])
        if theirs is None:
            assert out.routed_experts is None
            continue
        ours = out.routed_experts.long().sort(-1).values
        assert torch.equal(ours, theirs)
        assert (ours.diff(dim=-1) > 0).all()


@torch.no_grad()
def routed_by_transformers(model, ids):
    """Expert ids [len(ids), num_moe_layers, top_k], ascending."""
    seen = []
    routers = [m for n, m in model.named_modules() if n.endswith(("mlp.gate", "mlp.router"))]
    hooks = [router.register_forward_hook(lambda module, args, result: seen.append(result[2])) for router in routers]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, dim=1).sort(-1).values if seen else None


@pytest.mark.parametrize(
    ("family", "way"),
    [("qwen3_moe", way) for way in WAYS] + [(family, way) for family in FAMILIES for way in COMMON_WAYS],
)
def test_two_turns(family, way, model, open_engine, make_prompts, all_pages_are_back):
    """The second turn's prompts are the first turn's, their completions, and more."""
    engine, reference = open_engine(family, **WAYS[way]), model(family)
    prompts = make_prompts([1, 15, 16, 17, 33])
    first = engine.generate(prompts, GREEDY, return_routed_experts=True)
    more = [[*out.prompt_token_ids, *out.token_ids, 7, 8, 9] for out in first]
    second = engine.generate(more, GREEDY, return_routed_experts=True)
    judge(reference, first + second)
    judge_experts(reference, first + second)
    assert [len(out.token_ids) for out in first + second] == [14] * 10
    assert all(out.cached_tokens == 0 for out in first)
    cached = [out.cached_tokens for out in second]
    if "preemption" not in way:
        # all full pages of what had keys and values: the last token drawn has none
        full = [(len(out.prompt_token_ids) + 13) // 16 * 16 for out in first]
        assert cached == ([0] * 5 if way == "no-prefix-cache" else full)
    preempted = sum(out.num_preemptions for out in first + second)
    assert (preempted > 0) == ("preemption" in way)
    assert engine.info()["preemptions"] == preempted
    all_pages_are_back(engine)


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_sample_the_same_tokens(way, open_engine, make_prompts):
    engine, plain = open_engine("qwen3_moe", **WAYS[way]), open_engine("qwen3_moe")
    prompts, params = make_prompts([5, 20, 32]), SamplingParams(n=3, max_new_tokens=15, seed=3)
    ours, theirs = engine.generate(prompts, params), plain.generate(prompts, params)
    assert [out.token_ids for out in ours] == [out.token_ids for out in theirs]
    for out, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(out.logprobs, other.logprobs, rtol=0, atol=1e-4)


def test_the_same_prompt_again_computes_its_last_page_only(open_engine, watch, make_prompts):
    engine = open_engine()
    steps, (prompt,) = watch(engine), make_prompts([32])
    first, second = (engine.generate(prompt, SamplingParams(temperature=0, max_new_tokens=1)) for _ in range(2))
    assert (first[0].cached_tokens, second[0].cached_tokens) == (0, 16)
    assert steps.sizes == [32, 16]
    assert first[0].token_ids == second[0].token_ids


def test_prompts_that_differ_within_a_page_share_nothing_of_it(model, open_engine, make_prompts):
    engine, (prompt,) = open_engine(), make_prompts([40])
    others = [[*prompt[:at], (prompt[at] + 1) % 200, *prompt[at + 1 :]] for at in (0, 15, 16, 31, 32, 39)]
    engine.generate(prompt, GREEDY)
    outs = [engine.generate(other, GREEDY)[0] for other in others]
    assert [out.cached_tokens for out in outs] == [0, 0, 16, 16, 32, 32]
    judge(model("llama"), outs)


def test_what_was_evicted_is_computed_again(model, open_engine, make_prompts):
    engine = open_engine(kv_cache_tokens=64)
    prompts = make_prompts([40, 41, 42, 43])
    for _ in range(3):
        for prompt in prompts:
            judge(model("llama"), engine.generate(prompt, SamplingParams(temperature=0, max_new_tokens=9)))
    (again,) = engine.generate(prompts[-1], GREEDY)
    assert again.cached_tokens == 32


def test_experts_of_an_aborted_request_are_unknown_where_nothing_was_computed(
    model, open_engine, watch, call, make_prompts
):
    """-1 rows stand for tokens that were never computed; the rows before them are right."""
    engine, (prompt,) = open_engine("qwen3_moe", max_batch_size=4, max_step_tokens=4), make_prompts([30])
    steps = watch(engine)
    steps.seconds = 0.02
    waiting = call(engine.generate, prompt, GREEDY, return_routed_experts=True)
    steps.hold(3)
    engine.abort()
    (out,) = waiting.get()
    assert (out.finish_reason, out.token_ids, out.weight_versions) == ("abort", [], [])
    computed = (out.routed_experts >= 0).all(-1).all(-1).sum().item()
    assert 0 < computed < 29
    assert computed % 4 == 0
    assert (out.routed_experts[computed:] == -1).all()
    (whole,) = engine.generate(prompt, GREEDY, return_routed_experts=True)
    assert torch.equal(out.routed_experts[:computed], whole.routed_experts[:computed])
    judge_experts(model("qwen3_moe"), [whole])
