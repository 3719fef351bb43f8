"""Long sequences: what a request gets does not depend on how long its company is."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import Engine, EngineConfig, SamplingParams

FAMILIES = ("llama", "gemma2", "gpt_oss", "deepseek_v3")  # plain, soft caps, sinks, keys longer than values
LENGTHS = (300, 70, 140, 530, 250)


@pytest.mark.parametrize("threads", [1, 2], ids=["one-thread", "two-threads"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_company_of_other_lengths(name, dtype, threads, hf_model, save):
    model = hf_model(name)
    model.config.max_position_embeddings = 1024
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(200, (length,), generator=generator).tolist() for length in LENGTHS]
    params = [SamplingParams(seed=seed, max_new_tokens=6, ignore_eos=True) for seed in range(len(prompts))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Engine(save(model), EngineConfig(dtype=dtype, prefix_cache=False)) as engine:
            together = engine.generate(prompts, params)
            alone = [engine.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert torch.equal(ours.logprobs, theirs.logprobs)
