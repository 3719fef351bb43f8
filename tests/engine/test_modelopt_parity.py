"""Every ModelOpt export loads without a flag and gives ModelOpt's own logits; its bytes are ours."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import Engine, EngineConfig

EXPORTS = ["bf16", "fp8", "nvfp4", "fp8_kvfp8", "nvfp4_kvfp8"]


@pytest.fixture(params=["qwen3", "qwen3_moe"])
def model(request):
    return request.param


def compare(engine, expected):
    """|difference|, KL(expected || ours), top-1 disagreements."""
    ours = torch.stack(engine.logits(expected["input_ids"].tolist()))
    logp, logq = expected["logits"].log_softmax(-1), ours.log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1).mean().item()
    flips = (ours.argmax(-1) != expected["logits"].argmax(-1)).sum().item()
    return (ours - expected["logits"]).abs(), kl, flips


@pytest.mark.parametrize("export", EXPORTS)
def test_logits(model, export, modelopt_folder, expected_logits):
    with Engine(modelopt_folder(model, export), EngineConfig(dtype="float32")) as engine:
        difference, kl, flips = compare(engine, expected_logits(model, export))
    print(f"{model}/{export}: max {difference.max():.2e} mean {difference.mean():.2e} KL {kl:.1e} top-1 flips {flips}")
    assert difference.mean() < 1e-3
    assert kl < 1e-5
    assert flips == 0


@pytest.mark.parametrize("export", EXPORTS)
def test_logits_of_the_fast_cpu_kernel(model, export, modelopt_folder, expected_logits):
    """`exact` sums in another order, which may flip a rounding tie: in one sequence of three at most."""
    with Engine(modelopt_folder(model, export), EngineConfig(dtype="float32", linear_kernel="exact")) as engine:
        difference, _, _ = compare(engine, expected_logits(model, export))
    flipped = [sequence for sequence in difference if sequence.max() > 1e-3]
    print(f"{model}/{export}: {len(flipped)} of {len(difference)} sequences hold a flipped tie")
    assert len(flipped) <= 1
    for sequence in flipped:
        clean = sequence.amax(-1).le(1e-3).int().cumprod(0).sum()  # causal: exact up to the flip
        assert sequence[:clean].numel() == 0 or sequence[:clean].mean() < 1e-4


@pytest.mark.parametrize("export", ["fp8", "nvfp4"])
def test_bf16_weights_quantize_to_modelopts_bytes(model, export, modelopt_folder, bf16_weights):
    """A hot swap of the BF16 fixture into the quantized engine changes no stored byte: digests are equal."""
    folder = modelopt_folder(model, export)
    with Engine(folder) as engine:
        loaded, tensors = engine.digest(), [{k: t.clone() for k, t in s.tensors.items()} for s in engine.model.slots]
        report = engine.update_weights(bf16_weights(model), version="1")
        assert report.status == "committed"
        assert report.digest == loaded
        assert report.coverage == 1.0
        for slot, before in zip(engine.model.slots, tensors, strict=True):
            for key, value in slot.tensors.items():
                assert torch.equal(value, before[key]), f"{slot.name}/{key}"


@pytest.mark.parametrize("export", ["fp8_kvfp8", "nvfp4_kvfp8"])
def test_kv_scales_outlive_a_bf16_swap(export, model, modelopt_folder, bf16_weights):
    with Engine(modelopt_folder(model, export)) as engine:
        scales = [s for s in engine.model.slots if "k_scale" in s.tensors or "v_scale" in s.tensors]
        before = [next(iter(s.tensors.values())).clone() for s in scales]
        assert len(scales) == 4
        assert all(b > 0 for b in before)
        engine.update_weights(bf16_weights(model))
        assert all(torch.equal(next(iter(s.tensors.values())), b) for s, b in zip(scales, before, strict=True))


@pytest.mark.parametrize("export", ["fp8", "nvfp4"])
def test_a_quantized_checkpoint_opens_as_bf16(export, model, modelopt_folder, expected_logits):
    """Modules that stay unquantized are dequantized with their scale."""
    with Engine(modelopt_folder(model, export), EngineConfig(quant="bf16", dtype="float32")) as engine:
        difference, kl, _ = compare(engine, expected_logits(model, export))
        assert engine.info()["quant"] == ["bf16"]
        assert kl < 0.1  # weights rounded, activations not: near the quantized logits, not equal
        assert difference.mean() > 1e-4
