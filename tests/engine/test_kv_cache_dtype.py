"""`kv_cache_dtype`: keys and values in FP8, with a checkpoint's scales or 1."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import ConfigError, Engine, EngineConfig, SamplingParams, UnsupportedError
from rollmill.engine.llm.attention import WholeSequences
from rollmill.engine.llm.kv_cache import KVCache

PROMPT = list(range(3, 40))


@pytest.fixture
def keys_and_values(monkeypatch):
    """(folder, kv_cache_dtype) -> k and v of every layer, in float32."""

    def of(folder, kv_cache_dtype):
        seen, attend = [], WholeSequences.__call__

        def watched(self, spec, q, k, v, sinks=None):
            seen.append((k.clone(), v.clone()))
            return attend(self, spec, q, k, v, sinks)

        with monkeypatch.context() as patch, Engine(folder, make_config(kv_cache_dtype)) as engine:
            patch.setattr(WholeSequences, "__call__", watched)
            engine.logits([PROMPT])
        return seen

    return of


def make_config(kv_cache_dtype="auto", **options):
    return EngineConfig(dtype="float32", kv_cache_dtype=kv_cache_dtype, **options)


def test_keys_and_values_are_e4m3_numbers(hf_model, save, keys_and_values):
    folder = save(hf_model("qwen3"))
    plain, rounded = keys_and_values(folder, "auto"), keys_and_values(folder, "fp8")
    for before, after in zip(plain[0], rounded[0], strict=True):  # of the first layer, whose input is the same
        assert torch.equal(before.to(torch.float8_e4m3fn).float(), after)
    assert all(torch.equal(x, x.to(torch.float8_e4m3fn).float()) for pair in rounded for x in pair)


def test_generating_from_the_cache_agrees_with_whole_sequences(hf_model, save):
    params = SamplingParams(temperature=0, max_new_tokens=12)
    with Engine(save(hf_model("qwen3_moe")), make_config("fp8")) as engine:
        (out,) = engine.generate([PROMPT], params)
        (scores,) = engine.score([PROMPT + out.token_ids])
    torch.testing.assert_close(out.logprobs, scores[len(PROMPT) - 1 :], rtol=0, atol=1e-4)


def test_latent_attention_is_refused(hf_model, save):
    with pytest.raises(UnsupportedError, match="kv_cache_dtype='fp8'.*\n.*latent attention"):
        Engine(save(hf_model("deepseek_v3")), make_config("fp8"))


def test_a_cache_that_does_not_fit_says_what_would(hf_model, save, monkeypatch):
    empty = torch.empty

    def too_little(*shape, **options):
        if len(shape) == 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", too_little)
    with pytest.raises(ConfigError, match=r"KV cache of 4112 tokens of \d+ bytes.*kv_cache_tokens"):
        Engine(save(hf_model("qwen3")), make_config(kv_cache_tokens=4096))


def test_bytes_of_a_token():
    from rollmill.engine.llm.attention import AttentionSpec

    specs = [AttentionSpec(layer, 4, 128, 128, 1.0) for layer in range(48)]
    routed = 48 * 8 * 2
    assert KVCache.bytes_per_token(specs, (48, 8), torch.bfloat16) == 48 * 4 * 256 * 2 + routed
    assert KVCache.bytes_per_token(specs, (48, 8), torch.float8_e4m3fn) == 48 * 4 * 256 + routed
