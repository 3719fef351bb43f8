"""`EngineConfig(attention="fp8")`: rollouts attend as `fp8_attention.py` defines it where layers compute quantized, and
only there; who cannot have it is told why."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import asdict

from rollmill.engine import DiffusionParams, Engine, EngineConfig, FlowSDE, UnsupportedError
from rollmill.engine.dit.gpu.fp8_processor import FP8FluxAttnProcessor, use_fp8_attention
from rollmill.engine.dit.slot_linear import PrecisionSwitch
from rollmill.quant import Capability

PARAMS = DiffusionParams(
    steps=3, n=2, solver=FlowSDE(), want=["latents", "logprobs"], init_seed=1, step_seed=2, height=32, width=48
)
HOPPER = Capability(torch.device("cuda"), 90, ("triton",))


@pytest.fixture
def latents(make_embeds):
    """All latents of a rollout of one prompt."""

    def roll(engine, params=PARAMS, seed=0):
        samples = engine.generate([make_embeds("flux", seed=seed)], params)
        return torch.stack([sample.latents for sample in samples])

    return roll


def test_quantized_steps_attend_in_fp8_and_others_do_not(open_engine, latents):
    wide = open_engine("flux", quant="fp8", dual="bf16")
    narrow = open_engine("flux", quant="fp8", dual="bf16", attention="fp8")
    assert narrow.info()["attention"] == "fp8"
    assert wide.info()["attention"] == "bfloat16"
    for precision in ("bf16", "weight_only"):
        params = DiffusionParams(**{**asdict(PARAMS), "precision": precision})
        assert torch.equal(latents(narrow, params), latents(wide, params))
    found, expected = latents(narrow), latents(wide)
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_sample_does_not_notice_its_company(open_engine, make_embeds):
    engine = open_engine("flux", quant="fp8", attention="fp8")
    prompts = [make_embeds("flux", seed=seed) for seed in range(2)]
    together = engine.generate(prompts, PARAMS)
    again = engine.replay(together[3:])
    assert torch.equal(again[0].latents, together[3].latents)


def test_the_processor_attends_as_diffusers_does_but_for_codes(random_model):
    """Norms, rotation, streams and output linears are where diffusers has them: codes alone make a difference."""
    model = random_model("flux").float()
    x, text = torch.randn(2, 6, 16), torch.randn(2, 3, 48)
    given = {
        "hidden_states": x,
        "encoder_hidden_states": text,
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.rand(6, 3) * 4,
        "txt_ids": torch.zeros(3, 3),
    }
    with torch.no_grad():
        expected = model(**given).sample
        use_fp8_attention(model, Capability(torch.device("cpu"), None, ()), PrecisionSwitch(), quantized=True)
        assert all(type(one) is FP8FluxAttnProcessor for one in model.attn_processors.values())
        found = model(**given).sample
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.08


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant": "bf16", "attention": "fp8"}, "no layer is quantized"),
        ({"quant": "fp8", "attention": "torch"}, "'auto' and 'fp8'"),
    ],
    ids=["nothing quantized", "a language model's"],
)
def test_what_cannot_be_honoured_raises(open_engine, settings, reason):
    with pytest.raises(UnsupportedError, match=reason):
        open_engine("flux", **settings)


def test_other_models_do_not_have_it(open_engine):
    with pytest.raises(UnsupportedError, match="FluxTransformer2DModel has it, this is a SD3Transformer2DModel"):
        open_engine("sd3", quant="fp8", attention="fp8")


@pytest.mark.parametrize("capability", [HOPPER, Capability(torch.device("cuda"), 100, ("triton",))], ids=str)
def test_gpus_and_heads_without_a_kernel_are_named(random_model, capability):
    with pytest.raises(UnsupportedError) as error:
        use_fp8_attention(random_model("flux"), capability, PrecisionSwitch(), quantized=True)
    assert ("Hopper" in str(error.value)) == (capability.sm != 90)
    assert "heads of 128, this model's are 16" in str(error.value)


def test_language_models_refuse_it(modelopt_folder):
    with pytest.raises(UnsupportedError, match="diffusion transformers"):
        Engine(modelopt_folder("qwen3", "fp8"), EngineConfig(attention="fp8"))
