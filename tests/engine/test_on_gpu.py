"""The engine on a GPU: the same stored bytes as on a CPU, and the same logits within its arithmetic."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rollmill.engine import Engine, EngineConfig, SamplingParams, UnsupportedError
from rollmill.engine.llm.forward import no_flashinfer
from rollmill.moe import MoeConfig
from rollmill.moe.runners.triton import TritonRunner
from rollmill.quant import WeightShape, find_capability, make_scheme
from rollmill.quant.kernels.activation import quantize_activation

pytestmark = pytest.mark.gpu
EXPERTS = Qwen3MoeConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=8,
    num_experts_per_tok=2,
)


@pytest.fixture(autouse=True)
def gpu():
    try:
        find_capability("cuda")
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("export", ["bf16", "fp8", "nvfp4", "fp8_kvfp8", "nvfp4_kvfp8"])
@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_modelopt_logits(model, export, modelopt_folder, expected_logits):
    expected = expected_logits(model, export)
    folder = modelopt_folder(model, export)
    with Engine(folder, EngineConfig(dtype="float32", device="cuda")) as engine, Engine(folder, EngineConfig()) as cpu:
        assert engine.digest() == cpu.digest()
        ours = torch.stack(engine.logits(expected["input_ids"].tolist())).cpu()
    difference = (ours - expected["logits"]).abs()
    print(f"{model}/{export}: max {difference.max():.2e} mean {difference.mean():.2e}")
    assert difference.median() < 1e-4  # a rounding tie may fall the other way in a sequence
    assert difference.mean() < 2e-2


@pytest.mark.parametrize("quant", ["fp8", "fp8_channel", "nvfp4"])
def test_weights_quantize_to_the_cpus_bytes(quant):
    scheme, shape = make_scheme(quant), WeightShape((700, 300), 1040, units=3)
    weight = torch.randn(3, 1000, 1040, generator=torch.Generator().manual_seed(0)).bfloat16()
    gpu, cpu = scheme.quantize(weight.cuda(), shape), scheme.quantize(weight, shape)
    for name, value in cpu.items():
        assert torch.equal(gpu[name].cpu().view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("quant", ["fp8", "nvfp4"])
@pytest.mark.parametrize("activation", ["per_token", "per_tensor", "static"])
def test_activations_quantize_to_the_cpus_values(quant, activation):
    scheme, static = make_scheme(quant, activation), torch.tensor(0.003)
    x = torch.randn(1000, 1040, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scale = quantize_activation(x, scheme, static, torch.float32)
    gpu_values, gpu_scale = quantize_activation(x.cuda(), scheme, static.cuda(), torch.float32)
    assert torch.equal(gpu_values.cpu(), values)
    assert torch.equal(gpu_scale.cpu(), scale)


@pytest.mark.parametrize("quant", ["bf16", "fp8", "fp8_channel", "nvfp4", "nvfp4_w4a16"])
@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_swap_equals_cold_load(family, quant, hf_model, save):
    start, target = hf_model(family), hf_model(family, seed=1)
    config = EngineConfig(quant=quant, device="cuda")
    with Engine(save(start, "start"), config) as engine, Engine(save(target, "target"), config) as expected:
        kernel = engine.model.layers[0].attention.qkv.kernel.name
        addresses = [t.data_ptr() for slot in engine.model.slots for t in slot.tensors.values()]
        engine.update_weights((n, p.detach().cuda()) for n, p in target.named_parameters())
        assert engine.digest() == expected.digest()
        for slot, other in zip(engine.model.slots, expected.model.slots, strict=True):
            for key, value in slot.tensors.items():
                assert torch.equal(value.view(torch.uint8), other.tensors[key].view(torch.uint8)), f"{slot.name}/{key}"
        assert addresses == [t.data_ptr() for slot in engine.model.slots for t in slot.tensors.values()]
        params = SamplingParams(n=2, max_new_tokens=12, seed=1)
        hot, cold = (e.generate([[3, 14, 15], [9]], params) for e in (engine, expected))
        assert [o.token_ids for o in hot] == [o.token_ids for o in cold]
    print(f"{family} {quant}: kernel {kernel}")


@pytest.mark.parametrize("quant", ["bf16", "fp8", "fp8_channel", "nvfp4"])
def test_bf16_logits_are_as_near_to_float32_as_the_cpus(quant, hf_model, save):
    """Tiny random models amplify every rounding (NVFP4: half of the norm); a GPU may add no more than a CPU does."""
    folder = save(hf_model("mixtral"))
    prompts = [list(range(start, start + 20)) for start in range(0, 160, 20)]
    logits = {}
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32")):
        with Engine(folder, EngineConfig(quant=quant, device=device, dtype=dtype)) as engine:
            logits[device, dtype] = torch.cat(engine.logits(prompts)).cpu()
    reference = logits["cpu", "float32"]
    gpu, cpu = ((logits[device, "bfloat16"] - reference).norm() / reference.norm() for device in ("cuda", "cpu"))
    print(f"{quant}: relative error of BF16 engines, GPU {gpu:.4f}, CPU {cpu:.4f}")
    assert gpu < 1.3 * cpu


@pytest.mark.parametrize("quant", ["fp8", "fp8_channel", "nvfp4_w4a16"])
def test_experts_in_triton(quant, tmp_path):
    shape = MoeConfig(num_experts=8, top_k=2, hidden_size=512, intermediate_size=256)
    reason = TritonRunner.unsupported(shape, make_scheme("fp8"), find_capability("cuda"), torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(EXPERTS).bfloat16()
    model.save_pretrained(tmp_path)
    prompts = [list(range(start, start + 20)) for start in range(0, 160, 20)]
    logits = {}
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32")):
        with Engine(tmp_path, EngineConfig(quant=quant, device=device, dtype=dtype)) as engine:
            if device == "cuda":
                assert engine.model.layers[0].mlp.experts.runner.name == "triton"
                before = engine.digest()
                assert engine.update_weights(model.named_parameters(), version="1").status == "committed"
                assert engine.digest() == before
            logits[device, dtype] = torch.cat(engine.logits(prompts)).cpu()
    reference = logits["cpu", "float32"]
    gpu, cpu = ((logits[device, "bfloat16"] - reference).norm() / reference.norm() for device in ("cuda", "cpu"))
    print(f"{quant}: relative error of BF16 engines, GPU {gpu:.4f}, CPU {cpu:.4f}")
    assert gpu < 1.3 * cpu


@pytest.mark.parametrize("quant", ["bf16", "fp8_channel", "nvfp4_w4a16"])
def test_flashinfers_attention_and_graphs(quant, tmp_path):
    """The same prompts through torch's attention, FlashInfer's, and decoding steps as CUDA graphs."""
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(EXPERTS).bfloat16().save_pretrained(tmp_path)
    prompts = [list(range(start, start + 5 + start % 40)) for start in range(0, 160, 9)]
    params = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)
    outs = {}
    for name, settings in {
        "torch": {"attention": "torch"},
        "eager": {"attention": "auto", "cuda_graphs": False},
        "graphs": {"attention": "auto"},
    }.items():
        with Engine(tmp_path, EngineConfig(quant=quant, device="cuda", **settings)) as engine:
            if name == "graphs" and engine.rollouts.forward.graphs is None:
                pytest.skip(engine.model.uncapturable() or "flashinfer is not installed")
            outs[name] = engine.generate(prompts, params, return_routed_experts=True)
    same = [a.token_ids == b.token_ids for a, b in zip(outs["eager"], outs["graphs"], strict=True)]
    near = [
        (a.logprobs[:8] - b.logprobs[:8]).abs().max().item()
        for a, b in zip(outs["torch"], outs["graphs"], strict=True)
        if a.token_ids[:8] == b.token_ids[:8]
    ]
    print(f"{quant}: {sum(same)} of {len(same)} alike, {len(near)} near torch's, off by {max(near):.3f} at the most")
    assert len(near) > len(prompts) / 2
    assert max(near) < 0.2
    assert sum(same) > len(prompts) / 2
    assert all(out.routed_experts.min() >= 0 for out in outs["graphs"])


def test_overlapped_steps(tmp_path):
    """Steps launched ahead draw the same tokens, and launching one waits for nothing on the GPU."""
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(EXPERTS).bfloat16().save_pretrained(tmp_path)
    prompts = [list(range(start, start + 5 + start % 40)) for start in range(0, 160, 9)]
    params = SamplingParams(max_new_tokens=24, seed=3, ignore_eos=True)
    outs = {}
    for overlap in (False, True):
        with Engine(tmp_path, EngineConfig(quant="fp8_channel", device="cuda", overlap=overlap)) as engine:
            outs[overlap] = engine.generate(prompts, params)
            if not overlap or engine.rollouts.forward.graphs is None:
                continue
            requests = engine._requests(prompts, params, None, routed=False)
            engine.rollouts.submit(requests)
            for _ in range(4):
                engine.rollouts.step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(6):
                    engine.rollouts.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert requests[0].in_flight == 1
            engine.rollouts.abort(lambda request: True)
    for a, b in zip(outs[False], outs[True], strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=0)


def test_an_fp8_kv_cache(tmp_path):
    """FlashInfer reads codes; torch's attention the numbers that they stand for."""
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(EXPERTS).bfloat16().save_pretrained(tmp_path)
    prompts = [list(range(start, start + 5 + start % 40)) for start in range(0, 160, 9)]
    params, outs = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True), {}
    for attention in ("torch", "auto"):
        config = EngineConfig(device="cuda", kv_cache_dtype="fp8", attention=attention, kv_cache_tokens=4096)
        with Engine(tmp_path, config) as engine:
            if attention == "auto" and (reason := no_flashinfer(engine.model, config)) is not None:
                pytest.skip(reason)
            assert engine.rollouts.cache.holds_codes == (attention == "auto")
            outs[attention] = engine.generate(prompts, params)
    near = [
        (a.logprobs[:4] - b.logprobs[:4]).abs().max().item()
        for a, b in zip(outs["torch"], outs["auto"], strict=True)
        if a.token_ids[:4] == b.token_ids[:4]
    ]
    print(f"{len(near)} of {len(prompts)} near torch's, off by {max(near):.3f} at the most")
    assert len(near) > len(prompts) / 2
    assert max(near) < 0.2
