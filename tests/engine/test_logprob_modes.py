"""Log-probs of completions and prompts against transformers' logits; parameters of one batch; bad values."""

from __future__ import annotations

import msgspec
import pytest
import torch

from rollmill.engine import ConfigError, Engine, EngineConfig, NonFiniteError, RequestError, SamplingParams

PROMPTS = [[3, 14, 15], [92, 65, 35, 89, 79], list(range(1, 41))]
LONG = PROMPTS[2:]
INF = float("inf")


@pytest.fixture(scope="module")
def model(hf_model):
    return hf_model("llama")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.save_pretrained(path, state_dict=state)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    with Engine(folder, EngineConfig(dtype="float32")) as engine:
        yield engine


def hf_logprobs(model, ids, temperature=1.0):
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0].float() / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("mode", ["temperature", "sampled", "raw"])
def test_log_probs_are_those_of_transformers(engine, model, mode, temperature):
    params = SamplingParams(temperature=temperature, top_p=0.9, logprobs=mode, max_new_tokens=5, top_logprobs=3)
    params = msgspec.structs.replace(params, prompt_logprobs=True)
    for out in engine.generate(PROMPTS, params):
        ids, start = out.prompt_token_ids + out.token_ids, len(out.prompt_token_ids)
        want = hf_logprobs(model, ids, 1.0 if mode == "raw" else temperature or 1.0)
        at = torch.tensor(ids[1:])[:, None]
        each = want[:-1].gather(-1, at)[:, 0]
        torch.testing.assert_close(out.logprobs, each[start - 1 :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.prompt_logprobs, each[: start - 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.top_logprobs.logprobs, want[start - 1 : -1].topk(3).values, rtol=1e-4, atol=1e-4)
        assert torch.equal(out.top_logprobs.ids.long(), want[start - 1 : -1].topk(3).indices)


def test_no_log_probs(engine):
    (out,) = engine.generate(PROMPTS[:1], SamplingParams(logprobs=None, max_new_tokens=3, top_logprobs=2))
    assert out.logprobs is None
    assert out.top_logprobs.ids.shape == (3, 2)


WAYS = {
    "whole": {},
    "chunked": {"max_step_tokens": 7, "max_batch_size": 4},
    "few-pages": {"kv_cache_tokens": 64},
    "no-prefix-cache": {"prefix_cache": False},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_prompt_log_probs_are_the_scores(folder, way):
    params = SamplingParams(prompt_logprobs=True, max_new_tokens=12, n=2)
    with Engine(folder, EngineConfig(dtype="float32", **way)) as engine:
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=2))  # warms the prefix cache
        outs = engine.generate([*PROMPTS, [7]], params)
        for out in outs:
            (score,) = engine.score([out.prompt_token_ids])
            torch.testing.assert_close(out.prompt_logprobs, score, rtol=1e-4, atol=1e-4)
        assert any(out.num_preemptions for out in outs) == ("kv_cache_tokens" in way)


def test_equal_prompts_keep_their_own_temperatures(engine):
    """Requests with one prompt share its prefill, and score it each at its own temperature."""
    modes = [(1.0, "temperature"), (2.0, "temperature"), (2.0, "raw"), (0.0, "temperature")]
    params = [SamplingParams(temperature=t, logprobs=m, prompt_logprobs=True, max_new_tokens=1) for t, m in modes]
    outs = engine.generate(LONG * 4, params)
    for out, temperature in zip(outs, [1.0, 2.0, 1.0, 1.0], strict=True):
        (score,) = engine.score(LONG, temperature=temperature)
        torch.testing.assert_close(out.prompt_logprobs, score, rtol=1e-4, atol=1e-4)


def test_mixed_parameters_in_one_batch(folder):
    values = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.5, "top_p": 0.8, "logprobs": "processed", "sampling_mask": True},
        {"top_k": 3, "logprobs": "raw", "top_logprobs": 4},
        {"min_p": 0.1, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"allowed_token_ids": [5, 6, 7], "logit_bias": {6: 2.0}, "sampling_mask": True},
        {"prompt_logprobs": True, "temperature": 1.5},
    ]
    params = [SamplingParams(**one, seed=i, max_new_tokens=6) for i, one in enumerate(values)]
    with Engine(folder) as engine:
        together = engine.generate(PROMPTS[1:2] * len(params), params)
        for one, out in zip(params, together, strict=True):
            (alone,) = engine.generate(PROMPTS[1:2], one)
            assert (alone.token_ids, alone.logprobs.tolist()) == (out.token_ids, out.logprobs.tolist())
            masks = [[None if mask is None else mask.tolist() for mask in o.sampling_mask or []] for o in (alone, out)]
            assert masks[0] == masks[1]


def test_seeds_are_unique_and_recorded(engine):
    outs = [out for _ in range(3) for out in engine.generate(PROMPTS, SamplingParams(n=3, max_new_tokens=6))]
    assert len({out.seed for out in outs}) == len(outs) == 27
    again = engine.generate(
        [out.prompt_token_ids for out in outs], [SamplingParams(max_new_tokens=6, seed=out.seed) for out in outs]
    )
    assert [out.token_ids for out in again] == [out.token_ids for out in outs]
    counted = engine.generate(PROMPTS[:1], SamplingParams(n=3, max_new_tokens=2, seed=2**63 - 3))
    assert [out.seed for out in counted] == [2**63 - 3, 2**63 - 2, 2**63 - 1]


def test_engines_of_different_seeds_draw_differently(folder):
    drawn = []
    for seed in (0, 1):
        with Engine(folder, EngineConfig(seed=seed)) as engine:
            drawn.append(engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=20))[0].token_ids)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"temperature": INF}, "1e-6 to 1e6"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-50}, "1e-6 to 1e6"),
        ({"repetition_penalty": INF}, "repetition_penalty=inf"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"presence_penalty": -INF}, "presence_penalty=-inf"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias={5: nan}"),
        ({"logit_bias": {5: INF}}, "or -inf"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"allowed_token_ids": ["a"]}, "allowed_token_ids"),
        ({"seed": -1}, "2**63 - n"),
        ({"seed": 2**63 - 1, "n": 2}, "2**63 - n"),
        ({"stop": [[1]]}, "stop"),
        ({"top_logprobs": -1}, "top_logprobs >= 0"),
        ({"top_k": 1.5}, "top_k"),
        ({"n": True}, "n"),
        ({"n": 0, "allowed_token_ids": list(range(50000))}, "n >= 1"),
        ({"top_k": -1, "logit_bias": dict.fromkeys(range(50000), 1.0)}, "top_k=-1"),
        ({"allowed_token_ids": list(range(50000)) + [None]}, "allowed_token_ids"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_values_are_named(values, word):
    with pytest.raises(ConfigError) as error:
        SamplingParams(**values)
    assert word in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"logit_bias": {200: 1.0}}, ["token 200", "0..199"]),
        ({"allowed_token_ids": [-1]}, ["token -1"]),
        ({"stop": [5, 1000]}, ["token 1000"]),
        ({"top_logprobs": 201}, ["201", "200 tokens"]),
        ({"allowed_token_ids": [5, 6], "logit_bias": {5: -INF, 6: -INF, 7: 1.0}}, ["bans every token"]),
        ({"logit_bias": dict.fromkeys(range(200), -INF)}, ["bans every token"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_vocabulary_cannot_serve(engine, values, words):
    with pytest.raises(RequestError) as error:
        engine.generate(PROMPTS[:1], SamplingParams(**values))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("params", ["hot", {"n": 2}, 7, [None], [{"n": 1}], EngineConfig()], ids=str)
def test_parameters_of_another_kind(engine, params):
    with pytest.raises(RequestError, match="SamplingParams"):
        engine.generate(PROMPTS[:1], params)


def test_the_prompt_in_a_message_is_counted_by_prompts(folder):
    with (
        Engine(folder, EngineConfig(kv_cache_tokens=32)) as engine,
        pytest.raises(RequestError, match="prompt 1 has 40 tokens"),
    ):
        engine.generate([[1], LONG[0]], SamplingParams(n=4))


def test_a_broken_model_is_one_error(folder):
    with Engine(folder, EngineConfig(dtype="float32")) as engine:
        weight = engine.model.final_norm.clone()
        engine.model.final_norm.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="after 3 tokens"):
            engine.generate(PROMPTS, SamplingParams(max_new_tokens=4))
        assert engine.info()["requests"] == 0
        engine.model.final_norm.copy_(weight)
        assert len(engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=4))[0].token_ids) == 4
