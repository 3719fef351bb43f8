"""What a seeded request gets, bit for bit, whatever else is computed beside it."""

from __future__ import annotations

import msgspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rollmill.engine import Engine, EngineConfig, SamplingParams

PARAMS = SamplingParams(seed=5, max_new_tokens=3, top_logprobs=2, prompt_logprobs=True)
QUANTS = [
    ("bf16", "bfloat16"),
    ("fp8", "bfloat16"),
    ("nvfp4", "bfloat16"),
    ("bf16", "float32"),
    ("fp8", "float32"),
    ("nvfp4", "float32"),
]


def prompts_of(count, longest=20, vocab=200):
    lengths = [23, *torch.randint(1, longest, (count - 1,), generator=torch.Generator().manual_seed(1)).tolist()]
    return [[(i * 37 + j * 11) % vocab for j in range(length)] for i, length in enumerate(lengths)]


def same(one, other):
    assert one.token_ids == other.token_ids
    assert torch.equal(one.logprobs, other.logprobs)
    assert torch.equal(one.top_logprobs.ids, other.top_logprobs.ids)
    assert torch.equal(one.top_logprobs.logprobs, other.top_logprobs.logprobs)
    assert torch.equal(one.prompt_logprobs, other.prompt_logprobs)


@pytest.fixture
def threads():
    """Sets torch's threads; what they were comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def check_company(engine, threads, vocab=200, counts=(2, 7, 64), looked_at=3):
    prompts = prompts_of(64, vocab=vocab)
    threads(1)
    alone = [engine.generate([prompt], PARAMS)[0] for prompt in prompts[:looked_at]]
    for number in (1, 2):
        threads(number)
        for count in (1, *counts):
            for one, other in zip(engine.generate(prompts[:count], PARAMS), alone, strict=False):
                same(one, other)


@pytest.mark.parametrize(("quant", "dtype"), QUANTS, ids=lambda value: value)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_company(hf_model, save, threads, family, quant, dtype):
    """1, 2, 7 and 64 requests of different lengths, 1 and 2 threads."""
    config = EngineConfig(quant=quant, activation=None if quant == "bf16" else "per_token", dtype=dtype)
    with Engine(save(hf_model(family)), config) as engine:
        check_company(engine, threads)


@pytest.mark.parametrize(("quant", "dtype"), QUANTS, ids=lambda value: value)
def test_company_in_a_larger_model(save, threads, quant, dtype):
    """Sums over up to 1536 numbers, a vocabulary of 49152."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None, tie_word_embeddings=True)).eval()
    config = EngineConfig(quant=quant, activation=None if quant == "bf16" else "per_token", dtype=dtype)
    with Engine(save(model), config) as engine:
        check_company(engine, threads, vocab=49152, counts=(7,))


@pytest.mark.parametrize(("quant", "dtype"), QUANTS, ids=lambda value: value)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_ways_through_the_engine(hf_model, save, family, quant, dtype):
    """Chunked prefill or whole, prefix found or not, group or single."""
    folder, prompts = save(hf_model(family)), prompts_of(6)
    settings = {"quant": quant, "activation": None if quant == "bf16" else "per_token", "dtype": dtype}
    plain = msgspec.structs.replace(PARAMS, prompt_logprobs=False)
    with Engine(folder, EngineConfig(**settings)) as engine:
        (want,) = engine.generate(prompts[:1], PARAMS)
        missed, hit = (engine.generate([prompts[0][::-1]], plain)[0] for _ in range(2))
        assert hit.cached_tokens > missed.cached_tokens == 0
        assert (hit.token_ids, hit.logprobs.tolist()) == (missed.token_ids, missed.logprobs.tolist())
        found = engine.generate(prompts[:1], plain)[0]
        assert found.cached_tokens > 0
        assert (found.token_ids, found.logprobs.tolist()) == (want.token_ids, want.logprobs.tolist())
        group = engine.generate(prompts[:1], msgspec.structs.replace(PARAMS, n=3, seed=4))
        same(group[1], want)
    with Engine(folder, EngineConfig(**settings, max_step_tokens=8, max_batch_size=4)) as chunked:
        same(chunked.generate(prompts, PARAMS)[0], want)
