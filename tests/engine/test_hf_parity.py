"""float32 logits and greedy ids equal transformers', family by family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollmill.engine import CoverageError, Engine, EngineConfig, SamplingParams
from rollmill.engine.llm.attention import WholeSequences

PROMPTS = [[3, 14, 15, 92, 65], [35], [89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28], [84, 19, 71]]
FLOAT32 = EngineConfig(dtype="float32")
MOE_FAMILIES = ["qwen2_moe", "olmoe", "glm4_moe", "deepseek_v3", "gpt_oss"]


def hf_logits(model, prompt):
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0]


def test_logits(family, hf_model, save):
    model = hf_model(family)
    with Engine(save(model), FLOAT32) as engine:
        difference = max(
            (logits - hf_logits(model, prompt)).abs().max().item()
            for prompt, logits in zip(PROMPTS, engine.logits(PROMPTS), strict=True)
        )
    print(f"{family}: max |difference| {difference:.1e}")
    assert difference < 1e-4


def hf_greedy_ids(model, prompt, count):
    inputs = torch.tensor([prompt])
    reference = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return reference[0, len(prompt) :].tolist()


def test_greedy_choices_and_scores(family, hf_model, save):
    """Along transformers' greedy completion, the engine would choose every one of its tokens."""
    model, prompt = hf_model(family), PROMPTS[2]
    ids = hf_greedy_ids(model, prompt, 24)
    with Engine(save(model), FLOAT32) as engine:
        (logits,) = engine.logits([prompt + ids])
        (scores,) = engine.score([prompt + ids])
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ids
    expected = hf_logits(model, prompt + ids).log_softmax(-1)[:-1].gather(-1, torch.tensor(prompt + ids)[1:, None])
    torch.testing.assert_close(scores, expected[:, 0], rtol=0, atol=1e-4)


def test_greedy_ids(family, hf_model, save):
    model = hf_model(family)
    with Engine(save(model), FLOAT32) as engine:
        outs = engine.generate(PROMPTS, SamplingParams(temperature=0, max_new_tokens=24))
    for prompt, out in zip(PROMPTS, outs, strict=True):
        assert out.token_ids == hf_greedy_ids(model, prompt, 24)
        assert out.finish_reason == "length"


def test_bfloat16_is_as_near_as_transformers(family, hf_model, save):
    """Against float32: about as near as transformers in BF16; other top-1 ids only where the two best nearly tie."""
    model, prompt = hf_model(family), [*PROMPTS[2], *PROMPTS[0], *PROMPTS[3]]
    folder, exact = save(model), hf_logits(model, prompt)
    theirs = hf_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), prompt).float()
    with Engine(folder) as engine:
        (ours,) = engine.logits([prompt])
    error, their_error = (ours - exact).abs(), (theirs - exact).abs()
    gap = exact.topk(2).values.diff().abs().squeeze(-1)
    flips = ours.argmax(-1) != theirs.argmax(-1)
    print(f"{family}: mean {error.mean():.1e}, transformers' {their_error.mean():.1e}, top-1 flips {flips.sum()}")
    assert error.mean() < 1.5 * their_error.mean()
    assert (gap[flips] < 2 * their_error.max()).all()


def test_logprobs_and_scores(family, hf_model, save):
    model = hf_model(family)
    temperature = 0.7
    with Engine(save(model), FLOAT32) as engine:
        outs = engine.generate(
            PROMPTS, SamplingParams(n=2, temperature=temperature, max_new_tokens=9, top_p=0.9, seed=5)
        )
        scores = engine.score([out.prompt_token_ids + out.token_ids for out in outs], temperature=temperature)
    for out, score in zip(outs, scores, strict=True):
        ids = out.prompt_token_ids + out.token_ids
        logprobs = (hf_logits(model, ids) / temperature).log_softmax(-1)
        expected = logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(out.logprobs, expected[len(out.prompt_token_ids) - 1 :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routed_experts(family, hf_model, save):
    """Every row equals a re-run of transformers' router on the whole sequence."""
    model = hf_model(family)
    with Engine(save(model), FLOAT32) as engine:
        params = SamplingParams(n=2, max_new_tokens=7, seed=1)
        outs = engine.generate(PROMPTS, params, return_routed_experts=True)
    for out in outs:
        ids = out.prompt_token_ids + out.token_ids
        expected = routed_by_transformers(model, ids[:-1])
        assert out.routed_experts.dtype == torch.int16
        assert torch.equal(out.routed_experts.long(), expected)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_routed_experts_of_a_prompt(family, hf_model, save):
    model, prompt = hf_model(family), torch.tensor(PROMPTS[2])
    with Engine(save(model), FLOAT32) as engine:
        routed = []
        engine.model.hidden(prompt, torch.arange(len(prompt)), WholeSequences([len(prompt)]), routed)
        assert len(routed) == engine.model.routing[0]
    expected = routed_by_transformers(model, prompt.tolist())
    # DeepSeek's router returns its choices unsorted
    assert torch.equal(torch.stack(routed, dim=1).sort(-1).values, expected.sort(-1).values)


def routed_by_transformers(model, ids):
    """Expert ids [len(ids), num_moe_layers, top_k] of every router, in layer order."""
    seen = []
    routers = [m for n, m in model.named_modules() if n.endswith(("mlp.gate", "mlp.router"))]
    hooks = [r.register_forward_hook(lambda module, args, result: seen.append(result[2])) for r in routers]
    hf_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, dim=1)


def test_a_sharded_checkpoint(distinct_family, hf_model, save):
    model = hf_model(distinct_family)
    whole, parts = save(model, "whole"), save(model, "parts", max_shard_size="60KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    with Engine(whole) as one, Engine(parts) as many:
        assert one.digest() == many.digest()


@pytest.mark.parametrize("quant", ["bf16", "fp8", "nvfp4"])
def test_a_trainers_own_tensors(distinct_family, quant, hf_model, save):
    """`named_parameters()` and `state_dict()` of the transformers model: its in-process names, experts in 3-D."""
    start, target = hf_model(distinct_family), hf_model(distinct_family, seed=1)
    config = EngineConfig(quant=quant)
    with Engine(save(start, "start"), config) as engine, Engine(save(target, "target"), config) as expected:
        assert engine.digest() != expected.digest()
        engine.update_weights((n, p.detach()) for n, p in target.named_parameters())
        assert engine.digest() == expected.digest()
        engine.update_weights(start.state_dict(), version="back")
        engine.update_weights(target.bfloat16().state_dict(), version="forth")
        assert engine.digest() == expected.digest()
        for slot, other in zip(engine.model.slots, expected.model.slots, strict=True):
            assert all(torch.equal(t, other.tensors[k]) for k, t in slot.tensors.items())


def test_a_prefix_of_a_trainers_tensors(distinct_family, hf_model, save):
    """A stream that ends early commits whole layers or nothing; the full one follows as if it had not been."""
    target = hf_model(distinct_family, seed=1)
    pairs = [(n, p.detach()) for n, p in target.named_parameters()]
    with Engine(save(hf_model(distinct_family))) as engine, Engine(save(target, "target")) as expected:
        for cut in (1, len(pairs) // 3, len(pairs) - 1):
            before, version = engine.digest(), engine.weight_version
            try:
                assert engine.update_weights(pairs[:cut]).coverage < 1
            except CoverageError:
                assert (engine.digest(), engine.weight_version) == (before, version)
        engine.update_weights(pairs)
        assert engine.digest() == expected.digest()
