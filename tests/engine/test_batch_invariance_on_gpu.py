"""`batch_invariant=True` on a GPU: a request's tokens and log-probs have the same bits in any company, however its
prompt comes, and when they are computed again."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rollmill.engine import Engine, EngineConfig, SamplingParams, UnsupportedError
from rollmill.quant import find_capability

pytestmark = pytest.mark.gpu
VOCAB, NEW, LOOKED_AT = 1000, 24, 5  # a vocabulary that is no multiple of what kernels take at once
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4}
SIGMOID = {"moe_intermediate_size": 256, "n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 1}
QUANTS = ["bf16", "fp8_channel", "nvfp4_w4a16", "nvfp4"]
PARAMS = SamplingParams(seed=7, max_new_tokens=NEW, ignore_eos=True, temperature=0.8)
TRUNCATED = msgspec.structs.replace(PARAMS, top_p=0.9, top_k=40)
each_quant = pytest.mark.parametrize("quant", QUANTS)
each_model = pytest.mark.parametrize("model", ["dense", "experts"])


@pytest.fixture(scope="module", autouse=True)
def gpu():
    try:
        capability = find_capability("cuda")
    except UnsupportedError as error:
        pytest.skip(str(error))
    if capability.sm != 90:
        pytest.skip(f"batch-invariant kernels are for sm90, this is {capability}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    models = {
        "dense": Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
        "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)),
        "float32 router": Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, **SIGMOID)),
    }
    found = {}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.bfloat16().save_pretrained(found[name])
    return found


def prompts_of(count: int) -> list[list[int]]:
    """Of 1 to 600 tokens; the first ones are short, long, and as long as a block and a part of keys."""
    generator = torch.Generator().manual_seed(1)
    lengths = [23, 600, 1, 64, 256, *torch.randint(1, 400, (count - LOOKED_AT,), generator=generator).tolist()]
    return [[(i * 37 + j * 11) % VOCAB for j in range(length)] for i, length in enumerate(lengths[:count])]


def differences(some, others) -> list[int]:
    """Requests whose tokens or log-probs differ in a bit."""
    pairs = zip(some, others, strict=False)
    return [i for i, (a, b) in enumerate(pairs) if a.token_ids != b.token_ids or not same_bits(a.logprobs, b.logprobs)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def company(engine: Engine, params: SamplingParams) -> dict[int, list[int]]:
    """Number of requests together -> which of the first few are not what they are alone."""
    prompts = prompts_of(64)
    alone = [engine.generate(prompt, params)[0] for prompt in prompts[:LOOKED_AT]]
    found = {count: differences(alone, engine.generate(prompts[:count], params)) for count in (1, 7, 64)}
    print(f"top_p {params.top_p}: requests that differ in company of so many: {found}", flush=True)
    return found


def recomputed_differ(engine: Engine, prompts: list[list[int]], outs, params: SamplingParams) -> list[int]:
    """Completions whose log-probs are not those of the same tokens in a prompt."""
    again = msgspec.structs.replace(params, max_new_tokens=1, prompt_logprobs=True)
    scored = engine.generate([prompt + out.token_ids for prompt, out in zip(prompts, outs, strict=True)], again)
    pairs = zip(outs, scored, strict=True)
    return [i for i, (out, other) in enumerate(pairs) if not same_bits(out.logprobs, other.prompt_logprobs[-NEW:])]


def config(quant: str, **more) -> EngineConfig:
    settings = {"quant": quant, "device": "cuda", "batch_invariant": True, "prefix_cache": False}
    return EngineConfig(**settings | more)


@each_quant
@each_model
def test_company(model, quant, folders):
    with Engine(folders[model], config(quant)) as engine:
        assert company(engine, PARAMS) == {1: [], 7: [], 64: []}
        assert company(engine, TRUNCATED) == {1: [], 7: [], 64: []}


@each_quant
@each_model
def test_ways_through_the_engine(model, quant, folders):
    """Chunks of other sizes, no graphs, prefixes found, groups, and log-probs computed again as a prompt's."""
    prompts = prompts_of(20)
    with Engine(folders[model], config(quant)) as engine:
        want = engine.generate(prompts, PARAMS)
        assert recomputed_differ(engine, prompts, want, PARAMS) == []
        assert recomputed_differ(engine, prompts, engine.generate(prompts, TRUNCATED), TRUNCATED) == []
        group = engine.generate(prompts[1], msgspec.structs.replace(PARAMS, n=3, seed=6))
    assert differences([want[1]], [group[1]]) == []
    with Engine(folders[model], config(quant, max_step_tokens=96, max_batch_size=5, cuda_graphs=False)) as engine:
        assert differences(want, engine.generate(prompts, PARAMS)) == []
    with Engine(folders[model], config(quant, prefix_cache=True)) as engine:
        engine.generate(prompts, PARAMS)
        found = engine.generate(prompts, PARAMS)
    assert sum(out.cached_tokens for out in found) > 0
    assert differences(want, found) == []


def test_a_float32_router_is_refused(folders):
    with pytest.raises(UnsupportedError, match=r"products in torch\.float32"):
        Engine(folders["float32 router"], config("fp8_channel"))


def test_an_fp8_kv_cache(folders):
    """It holds what the codes stand for: sums over codes would take keys in another order in prompts."""
    prompts = prompts_of(20)
    with Engine(folders["experts"], config("fp8_channel", kv_cache_dtype="fp8")) as engine:
        assert not engine.rollouts.cache.holds_codes
        assert company(engine, PARAMS) == {1: [], 7: [], 64: []}
        assert recomputed_differ(engine, prompts, engine.generate(prompts, PARAMS), PARAMS) == []


def test_near_the_usual_engine(folders):
    """Another order of sums, the same model."""
    prompts, outs = prompts_of(20), {}
    for invariant in (False, True):
        settings = config("bf16", batch_invariant=invariant)
        with Engine(folders["dense"], settings) as engine:
            outs[invariant] = engine.generate(prompts, msgspec.structs.replace(PARAMS, max_new_tokens=1))
    same = [(a, b) for a, b in zip(outs[False], outs[True], strict=True) if a.token_ids == b.token_ids]
    assert len(same) > len(prompts) / 2
    assert max((a.logprobs - b.logprobs).abs().max().item() for a, b in same) < 0.1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attention": "torch"}, "attention='torch'"),
        ({"attention": "flashinfer"}, "attention='flashinfer'"),
        ({"linear_kernel": "triton_fp8"}, "torch_fp8 does not"),
        ({"dtype": "float32"}, "library"),
        ({"activation": "per_tensor"}, "one scale for all rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_depends_on_company_is_refused(folders, settings, reason):
    with pytest.raises(UnsupportedError, match=reason):
        Engine(folders["dense"], config("fp8_channel", **settings))
