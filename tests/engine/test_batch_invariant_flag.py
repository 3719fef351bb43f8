"""`EngineConfig(batch_invariant=True)`: what it takes, what it refuses, and recomputed log-probs on a CPU."""

from __future__ import annotations

import msgspec
import pytest
import torch

from rollmill.engine import Engine, EngineConfig, SamplingParams, UnsupportedError
from rollmill.engine.checkpoint import Checkpoint
from rollmill.engine.dit.engine import _check_diffusion
from rollmill.engine.env import read_toggles
from rollmill.engine.kernel_names import KernelNames
from rollmill.engine.kernel_table import kernel_table
from rollmill.engine.llm.decoder import Decoder
from rollmill.engine.llm.models import find_family
from rollmill.engine.llm.parts import Parts
from rollmill.engine.schemes import SchemeResolver
from rollmill.quant import Capability
from rollmill.quant.kernels.torch_fp8 import cpu_takes_row_scales

HOPPER = Capability(torch.device("meta"), 90, ("triton",))
PARAMS = SamplingParams(seed=5, max_new_tokens=6, ignore_eos=True)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], list(range(40)), [6]]


def config(**settings) -> EngineConfig:
    return EngineConfig(batch_invariant=True, **settings)


@pytest.mark.parametrize("quant", ["bf16", "fp8", "nvfp4", "nvfp4_w4a16"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_cpu_engine_holds_it_as_it_is(family, quant, hf_model, save):
    """The same kernels and the same bits as without the flag."""
    folder, outs, kernels = save(hf_model(family)), [], []
    for settings in (config(quant=quant), EngineConfig(quant=quant)):
        with Engine(folder, settings) as engine:
            outs.append(engine.generate(PROMPTS, PARAMS))
            kernels.append([type(layer.attention.qkv.kernel) for layer in engine.model.layers])
    assert kernels[0] == kernels[1]
    for one, other in zip(*outs, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize("quant", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_log_probs_computed_again_have_the_same_bits(family, quant, hf_model, save):
    """As the prompt of another request: in one chunk or several, whatever the temperature."""
    params = msgspec.structs.replace(PARAMS, temperature=0.7)
    again = msgspec.structs.replace(params, max_new_tokens=1, prompt_logprobs=True)
    folder = save(hf_model(family))
    with Engine(folder, config(quant=quant)) as engine:
        outs = engine.generate(PROMPTS, params)
    for more in ({}, {"max_step_tokens": 8, "max_batch_size": 4}):
        with Engine(folder, config(quant=quant, **more)) as engine:
            scored = engine.generate([p + o.token_ids for p, o in zip(PROMPTS, outs, strict=True)], again)
        for out, other in zip(outs, scored, strict=True):
            assert torch.equal(out.logprobs, other.prompt_logprobs[-len(out.token_ids) :])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("quant", ["fp8", "nvfp4"])
def test_one_scale_for_all_tokens_is_refused(family, quant, hf_model, save):
    folder = save(hf_model(family))
    with pytest.raises(UnsupportedError, match="per tensor have one scale for all rows"):
        Engine(folder, config(quant=quant, activation="per_tensor"))


@pytest.mark.skipif(not cpu_takes_row_scales(), reason="this torch's _scaled_mm takes no scale a row on a CPU")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_kernel_that_is_not_is_refused_by_name(family, hf_model, save):
    """Of linears, and of the linears that experts are made of."""
    folder = save(hf_model(family))
    with pytest.raises(UnsupportedError, match="torch_fp8: a row was seen to keep its bits on sm90, and this is cpu"):
        Engine(folder, config(quant="fp8", linear_kernel="torch_fp8"))
    keep = ["*self_attn*", "*.gate", "lm_head"]
    with pytest.raises(UnsupportedError, match="torch_fp8"):
        Engine(folder, config(quant="fp8", linear_kernel="torch_fp8", keep=keep))


def test_diffusion_transformers_take_no_such_flag():
    with pytest.raises(UnsupportedError, match="batch_invariant=True"):
        _check_diffusion(config())


def model_on_hopper(folder, quant: str) -> Decoder:
    """As an engine there would build it, without memory."""
    checkpoint = Checkpoint(folder)
    resolver = SchemeResolver(config(quant=quant), checkpoint.quant_plan(), checkpoint.tensor_names, read_toggles())
    parts = Parts(resolver, HOPPER, torch.bfloat16, KernelNames(batch_invariant=True))
    return Decoder(checkpoint.read_config(find_family(checkpoint.architectures)), parts)


@pytest.mark.parametrize(
    ("quant", "kernel"), [("bf16", "triton_bf16"), ("fp8", "torch_fp8"), ("nvfp4", "triton_nvfp4_invariant")]
)
def test_a_dense_model_on_hopper(quant, kernel, hf_model, save):
    model = model_on_hopper(save(hf_model("qwen3")), quant)
    for layer in model.layers:
        assert {layer.attention.qkv.kernel.name, layer.attention.out.kernel.name} == {kernel}
        assert {layer.mlp.gate_up.kernel.name, layer.mlp.down.kernel.name} == {kernel}
    assert model.head is None or model.head.kernel.name == "triton_bf16"
    assert model.matmul.__name__ == "bf16_matmul"


def test_a_float32_router_on_hopper_is_refused(hf_model, save):
    folder = save(hf_model("glm4_moe"))
    with pytest.raises(UnsupportedError, match=r"products in torch\.float32"):
        model_on_hopper(folder, "fp8")


def test_the_table_of_kernels_says_it():
    rows = kernel_table(None, config(), HOPPER)
    assert {row.kernel for row in rows if row.is_taken} == {"torch_fp8", "triton_nvfp4_invariant", "triton"}
    (verdict,) = {row.verdict for row in rows if row.kernel == "triton_fp8" and row.scheme.startswith("fp8")}
    assert verdict == "it sums few tokens in another order than many; torch_fp8 does not"
