"""The fused forward of a tiny FLUX.1 against diffusers' own, layer by layer and in float32; in the interpreter, as for
a Hopper GPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformer2DModel
from safetensors.torch import load_file

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine import EngineConfig  # noqa: E402 (after the conftest's set-up)
from rollmill.engine.dit.families import default_keep  # noqa: E402
from rollmill.engine.dit.gpu.forward import FusedForward  # noqa: E402
from rollmill.engine.dit.transformer import PrecisionSwitch, Transformer  # noqa: E402
from rollmill.engine.env import read_toggles  # noqa: E402
from rollmill.engine.kernel_names import KernelNames  # noqa: E402
from rollmill.engine.schemes import SchemeResolver  # noqa: E402
from rollmill.quant import AmaxMeter, Capability  # noqa: E402
from rollmill.weight_sync import Policy, SyncPlan  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = Capability(DEVICE, 90, ("triton",))
FOLDER = Path(__file__).parents[3] / "data" / "dit" / "flux1-bf16"
QUANTS = ["bf16", "fp8", "fp8_channel"]
TEXT, IMAGE = 2, 3  # tokens
SMALL = {"num_layers": 1, "num_single_layers": 1}  # of the two of each


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((FOLDER / "transformer" / "config.json").read_text()) | SMALL


@pytest.fixture(scope="module")
def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    stored = load_file(FOLDER / "transformer" / "diffusion_pytorch_model.safetensors")
    return {name: value for name, value in stored.items() if "blocks.1." not in name}


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Two samples that differ in everything."""
    stored = load_file(FOLDER / "io.safetensors")
    one = {name.removeprefix("in."): value.to(DEVICE) for name, value in stored.items() if name.startswith("in.")}
    few = {"hidden_states": IMAGE, "img_ids": IMAGE, "encoder_hidden_states": TEXT, "txt_ids": TEXT}
    one |= {name: one[name][..., :tokens, :] for name, tokens in few.items()}
    two = {name: torch.cat([value, value.flip(-1) * 0.9]) for name, value in one.items() if "ids" not in name}
    floats = {name: value.bfloat16() for name, value in two.items() if name != "guidance"}
    return {**floats, "guidance": two["guidance"], "img_ids": one["img_ids"], "txt_ids": one["txt_ids"]}


def make(config: dict[str, Any], weights: dict[str, torch.Tensor], quant: str, **options: Any) -> Transformer:
    slow = quant.startswith("fp8") and DEVICE.type == "cpu"  # a product in the interpreter
    options = {"linear_kernel": "torch_fp8" if slow else "auto", **options}
    settings = EngineConfig(quant=quant, **options)  # pyright: ignore[reportArgumentType]
    resolver = SchemeResolver(settings, None, set(), read_toggles(), default_keep(config["_class_name"]))
    made = Transformer(
        "transformer",
        config,
        resolver,
        PrecisionSwitch(),
        capability=HOPPER,
        dtype=torch.bfloat16,
        names=KernelNames(settings.linear_kernel),
        dual=settings.dual is not None,
        fp8_attention=settings.attention == "fp8",
    )
    plan = SyncPlan(made.slots, twins=made.twins, components=("transformer",))
    made.policy = Policy(plan)  # pyright: ignore[reportAttributeAccessIssue]
    swap(made, weights)
    made.compute_within(nullcontext)
    return made


def swap(transformer: Any, weights: dict[str, torch.Tensor]) -> None:
    transformer.policy.update({f"transformer.{name}": value for name, value in weights.items()}, None)


def run(transformer: Transformer, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return transformer.module(**inputs, return_dict=False, **more)[0].float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_fused(
    transformer: Transformer, inputs: dict[str, Any], expected: torch.Tensor, *, graphs: bool = False
) -> torch.Tensor:
    """Fused it is about as far from float32 as layer by layer, and from itself."""
    apart = run(transformer, inputs)
    transformer.fuse(graphs=graphs)
    fused = run(transformer, inputs)
    assert transformer.unfused() is None
    assert distance(fused, expected) < 1.25 * distance(apart, expected)
    assert 0 < distance(fused, apart) < 1.25 * distance(apart, expected)
    return fused


@pytest.fixture(scope="module")
def expected(config: dict[str, Any], weights: dict[str, torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
    """What diffusers computes in float32."""
    model: Any = FluxTransformer2DModel.from_config(config).float().to(DEVICE)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    with torch.no_grad():
        return model(**{name: value.float() for name, value in inputs.items()}, return_dict=False)[0]


@pytest.mark.parametrize("quant", QUANTS)
def test_fused_is_as_near_to_float32_as_layer_by_layer(quant, config, weights, inputs, expected):
    transformer = make(config, weights, quant)
    fused = check_fused(transformer, inputs, expected)
    assert torch.equal(transformer.module(**inputs).sample.float(), fused)  # as diffusers returns it


@pytest.mark.skipif(DEVICE.type == "cuda", reason="its kernel is for heads of 128, this model's are 16")
def test_fp8_attention_is_fused_as_the_processors_compute_it(config, weights, inputs, expected, bf16_heads):
    transformer = make(config, weights, "fp8", attention="fp8", dual="bf16")
    check_fused(transformer, inputs, expected)
    with transformer.switch.at("bf16"):
        assert torch.equal(run(transformer, inputs), bf16_heads)


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.skipif(DEVICE.type == "cpu", reason="the kernel is for Hopper: no CUDA device here")
def test_the_kernel_of_fp8_attention_serves_the_fused_forward(config: dict[str, Any]):
    """Two samples, heads of 128, tokens that are no multiple of a tile."""
    config = config | {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": [16, 56, 56]}
    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel.from_config(config).to(DEVICE)
    weights = {name: value + 0.02 * torch.randn_like(value) for name, value in model.state_dict().items()}
    for name in weights:
        if ".attn.norm" in name:
            weights[name] *= 3  # of q and k: a token then attends to few, so that wrong scores are seen
    weights = {name: value.bfloat16() for name, value in weights.items()}
    model.load_state_dict(weights)
    given = {
        "hidden_states": torch.randn(2, 150, config["in_channels"]),
        "encoder_hidden_states": torch.randn(2, 33, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.2, 0.7]),
    }
    given = {name: value.bfloat16().to(DEVICE) for name, value in given.items()}
    given |= {"img_ids": torch.arange(450, device=DEVICE).view(150, 3) % 13.0, "txt_ids": torch.zeros(33, 3).to(DEVICE)}
    if config["guidance_embeds"]:
        given["guidance"] = torch.tensor([3.5, 1.0], device=DEVICE)
    with torch.no_grad():
        expected = model(**{name: value.float() for name, value in given.items()}, return_dict=False)[0]
    check_fused(make(config, weights, "fp8", attention="fp8"), given, expected, graphs=True)


@pytest.fixture
def bf16_heads(config, weights, inputs):
    """What the BF16 copy gives where attention is BF16 throughout."""
    plain = make(config, weights, "bf16")
    plain.fuse(graphs=False)
    return run(plain, inputs)


def test_a_swap_reaches_the_fused_forward(config, weights, inputs):
    transformer, other = make(config, weights, "fp8"), {name: value * 0.9 for name, value in weights.items()}
    transformer.fuse(graphs=DEVICE.type == "cuda")
    before = run(transformer, inputs)
    swap(transformer, other)
    cold = make(config, other, "fp8")
    cold.fuse(graphs=DEVICE.type == "cuda")
    after = run(transformer, inputs)
    assert torch.equal(after, run(cold, inputs))
    assert not torch.equal(after, before)


def test_the_bf16_copy_is_fused_too(config, weights, inputs):
    both, plain = make(config, weights, "fp8", dual="bf16"), make(config, weights, "bf16")
    for transformer in (both, plain):
        transformer.fuse(graphs=False)
    with both.switch.at("bf16"):
        assert torch.equal(run(both, inputs), run(plain, inputs))


@pytest.fixture
def unfused(config, weights, inputs):
    """Whether a forward of a fused transformer goes layer by layer: to the same bits as without fusing."""

    def check(transformer: Transformer, precision: str = "quantized", **more: Any) -> bool:
        with transformer.switch.at(precision):
            transformer._fused = None
            expected = run(transformer, inputs, **more)
            transformer.fuse(graphs=False)
            assert isinstance(transformer._fused, FusedForward)
            return torch.equal(run(transformer, inputs, **more), expected)

    return check


def test_a_processor_of_ones_own_goes_layer_by_layer(config, weights, unfused):
    transformer = make(config, weights, "fp8")
    transformer.module.set_attn_processor(OwnProcessor())
    assert unfused(transformer)


class OwnProcessor(FluxAttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_what_is_not_fused_goes_layer_by_layer(config, weights, inputs, unfused):
    transformer = make(config, weights, "fp8")
    assert not unfused(transformer)
    assert transformer.unfused() is None
    assert unfused(transformer, "weight_only")
    residuals = [torch.ones(2, IMAGE, 128, dtype=torch.bfloat16, device=DEVICE)]
    assert unfused(transformer, controlnet_block_samples=residuals)
    seen: list[Any] = []
    hook = transformer.module.single_transformer_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    assert unfused(transformer)
    assert len(seen) == 2
    hook.remove()
    linear = next(one.served.slot for names, one in transformer.linears.items() if "ff.net.2" in names[0])
    linear.meter = meter = AmaxMeter(DEVICE)
    assert unfused(transformer)
    assert float(meter.amax) > 0  # and what watches sees


def test_weights_that_are_padded_go_layer_by_layer(config):
    """FP8 products want multiples of 16: a hidden size of 24 is none."""
    odd = config | {"attention_head_dim": 12, "axes_dims_rope": [4, 4, 4]}
    model: Any = FluxTransformer2DModel.from_config(odd)
    transformer = make(odd, {name: value.bfloat16() for name, value in model.state_dict().items()}, "fp8")
    transformer.fuse(graphs=False)
    assert "multiples of 16" in str(transformer.unfused())


@pytest.mark.parametrize(
    ("quant", "options"),
    [("fp8", {"activation": "per_tensor"}), ("nvfp4", {"linear_kernel": "exact"}), ("fp8", {"keep": ["*.to_q"]})],
    ids=["per-tensor scales", "nvfp4", "q stored otherwise"],
)
def test_schemes_that_are_not_fused_go_layer_by_layer(quant, options, config, weights, unfused):
    transformer = make(config, weights, quant, **options)
    assert unfused(transformer)
    assert transformer.unfused() is not None
