"""Any diffusers transformer made of `nn.Linear`: opens in every format, computes what it should, is swapped."""

from __future__ import annotations

import ast

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file

from rollmill.engine import UnsupportedError

OTHERS = ["pixart", "sana", "ltx", "cogvideox", "auraflow", "lumina2", "hunyuan-video", "chroma"]
FAMILIES = ["flux1", "flux2", "wan", "wan-i2v", "sd3", "qwen"]


@pytest.fixture(params=OTHERS + FAMILIES)
def name(request):
    return request.param


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


def test_unquantized_it_is_diffusers_own(name, make_model, plain_model, output, open_engine):
    engine = open_engine(make_model(name), dtype="float32")
    assert isinstance(engine.transformer, ModelMixin)
    assert relative(output(name, engine.transformer), output(name, plain_model(name))) < 2e-6


def test_quantized_weights_are_those_of_plain_torch(
    name, quant, make_model, plain_model, output, open_engine, fake_quantized
):
    """Activations as they are: what is left is the rounding of the weights, computed apart."""
    engine = open_engine(make_model(name), quant=quant, keep=[], dtype="float32")
    transformer = engine.transformers["transformer"]
    with transformer.switch.at("weight_only"):
        got = output(name, transformer.module)
    plain = plain_model(name)
    unquantized = output(name, plain)
    assert relative(got, output(name, fake_quantized(name, plain, quant))) < 1e-5
    assert 1e-4 < relative(output(name, engine.transformer), unquantized) < {"fp8": 0.12, "nvfp4": 0.4}[quant]


def test_a_swap_equals_a_cold_load(name, quant, make_model, tmp_path, open_engine, snapshot, output):
    folder = make_model(name)
    engine = open_engine(folder, quant=quant)
    before, digest = snapshot(engine), engine.digest()
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    engine.update_weights({key: (w.float() * 1.5 + 0.01).to(w.dtype) for key, w in weights.items()}, version="1")
    assert all(value != before[key] for key, value in snapshot(engine).items() if not key.endswith("scale"))
    assert engine.update_weights(folder, version="2").digest == digest
    assert snapshot(engine) == before


def test_linears_that_the_format_cannot_hold(make_model, open_engine, plain_model, output):
    """K = 170: one error names them all, and what it says to write helps."""
    with pytest.raises(UnsupportedError, match=r"3 modules of ZImageTransformer2DModel.*quantized as asked") as error:
        open_engine(make_model("z-image"), quant="nvfp4")
    said = str(error.value)
    assert all(f"{block}.0.feed_forward.w2" in said for block in ("noise_refiner", "context_refiner", "layers"))
    assert "multiple of 16" in said
    keep = ast.literal_eval(said.partition("keep=")[2].rstrip(")"))
    engine = open_engine(make_model("z-image"), quant="nvfp4", keep=keep, dtype="float32")
    assert relative(output("z-image", engine.transformer), output("z-image", plain_model("z-image"))) < 0.4
    open_engine(make_model("z-image"), quant="fp8")


def test_the_advice_holds_what_was_kept_already(make_model, open_engine):
    with pytest.raises(UnsupportedError, match=r"keep=\['x_pad_token', '\*t_embedder\*', 'noise_refiner"):
        open_engine(make_model("z-image"), quant="nvfp4", keep=["x_pad_token", "*t_embedder*"])


def test_a_model_that_computes_with_a_weight_itself(quant, make_model, open_engine, plain_model, output):
    """HunyuanDiT's pooling hands weights to torch's attention: those are there in BF16, and refused if quantized."""
    plain = output("hunyuan-dit", plain_model("hunyuan-dit"))
    engine = open_engine(make_model("hunyuan-dit"), dtype="float32")
    assert relative(output("hunyuan-dit", engine.transformer), plain) < 2e-6
    quantized = open_engine(make_model("hunyuan-dit"), quant=quant, dtype="float32")
    with pytest.raises(UnsupportedError, match=r"keep=\[\.\.\., 'time_extra_emb\.pooler\.\*'\]"):
        output("hunyuan-dit", quantized.transformer)
    kept = open_engine(make_model("hunyuan-dit"), quant=quant, keep=["time_extra_emb.pooler.*"], dtype="float32")
    assert relative(output("hunyuan-dit", kept.transformer), plain) < 0.4


def test_a_weight_is_looked_at_without_being_read(quant, make_model, open_engine):
    engine = open_engine(make_model("flux1"), quant=quant)
    block = engine.transformer.transformer_blocks[0]
    weight = block.attn.to_q.weight
    assert (weight.dtype, tuple(weight.shape), weight.device.type, weight.ndim) == (torch.bfloat16, (64, 64), "cpu", 2)
    assert weight.size(0) == weight.shape[0]
    for compute in (lambda: weight + 1, lambda: torch.cat([weight, weight]), lambda: weight.data, lambda: weight.T):
        with pytest.raises(UnsupportedError, match=r"attn\.to_q is quantized"):
            compute()
    stored = load_file(make_model("flux1") / "diffusion_pytorch_model.safetensors")
    kept = engine.transformer.x_embedder.weight
    assert torch.equal(kept + 0, stored["x_embedder.weight"])
    assert torch.equal(torch.cat([kept, kept])[64:], stored["x_embedder.weight"])


def test_torchs_own_attention_is_refused_or_kept(tmp_path, open_engine, monkeypatch, quant):
    class AttendingTransformer(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)
            self.out = torch.nn.Linear(width, width)

        def forward(self, x):
            return self.out(self.attention(x, x, x)[0])

    monkeypatch.setattr(diffusers, "AttendingTransformer", AttendingTransformer, raising=False)
    torch.manual_seed(0)
    model = AttendingTransformer().to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"attention\.out_proj: .*more than a linear layer"):
        open_engine(tmp_path, quant=quant)
    engine = open_engine(tmp_path, quant=quant, keep=["attention.out_proj"], dtype="float32")
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attended = model.float().attention(x, x, x)[0]
        torch.testing.assert_close(engine.transformer.attention(x, x, x)[0], attended)
    assert {slot.name for slot in engine._policy.plan.slots if slot.scheme.name == quant} == {"transformer.out"}


@pytest.mark.parametrize(("kernel", "says"), [("warp", "known: auto"), ("bf16", "bf16: computes unquantized")])
def test_a_kernel_that_cannot_names_the_module_and_every_reason(kernel, says, quant, make_model, open_engine):
    with pytest.raises(UnsupportedError, match=r"(?s)(context_embedder|norm1\.linear): .*" + says) as error:
        open_engine(make_model("flux1"), quant=quant, linear_kernel=kernel)
    assert "keep" not in str(error.value), "what is wrong is the kernel, not the module"
