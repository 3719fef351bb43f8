"""The names of diffusers models that a trainer has fused, and every tensor that is not a linear's weight."""

from __future__ import annotations

import diffusers
import pytest
import torch

from rollmill.engine import CoverageError
from rollmill.engine.dit.transformer import transformer_class

FUSED = {
    "flux1": {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")},
    "wan": {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")},
}


def diffusers_model(folder, weights, **options):
    module = getattr(
        diffusers, {"flux1": "FluxTransformer2DModel", "wan": "WanTransformer3DModel"}[folder.parent.name.split("-")[0]]
    )
    model = module.from_pretrained(folder, torch_dtype=torch.bfloat16, **options)
    model.load_state_dict(weights, assign=True)
    return model


def fused_state(model, folder, weights):
    """What `fuse_qkv_projections` leaves in a model's state, without the parts that it keeps beside."""
    trained = diffusers_model(folder, weights)
    trained.fuse_qkv_projections()
    state = trained.state_dict()
    joined = [name for name in state if FUSED[model].keys() & set(name.split("."))]
    for name in joined:
        parent, leaf, tensor = name.rsplit(".", 2)
        for part in FUSED[model][leaf]:
            state.pop(f"{parent}.{part}.{tensor}", None)
    return state, joined


def test_fused_names_give_the_bytes_of_the_parts(model, quant, dit, open_engine, other_weights, snapshot):
    weights = other_weights(model)
    state, joined = fused_state(model, dit(model), weights)
    assert {name.split(".")[-2] for name in joined} == set(FUSED[model])
    assert {name.split(".")[-1] for name in joined} == {"weight", "bias"}
    parts, fused = (open_engine(dit(model, quant)) for _ in range(2))
    parts.update_weights(weights, version="1")
    assert fused.update_weights(state, version="1").digest == parts.digest()
    assert snapshot(fused) == snapshot(parts)


def test_a_fused_weight_and_its_parts_are_a_double(model, quant, dit, open_engine, other_weights, unchanged):
    weights = other_weights(model)
    state, joined = fused_state(model, dit(model), weights)
    engine = open_engine(dit(model, quant))
    check = unchanged(engine, model)
    with pytest.raises(CoverageError, match="duplicate"):
        engine.update_weights({**weights, joined[0]: state[joined[0]]}, version="1")
    check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_other_tensor_arrives_and_is_equal(dtype, model, quant, dit, open_engine, other_weights):
    """Convolutions, tables, norms, biases: as sent, in the dtype that diffusers keeps them in."""
    engine = open_engine(dit(model, quant), dtype=dtype)
    weights = other_weights(model)
    engine.update_weights(weights, version="1")
    served = {name: value for name, value in engine.transformer.state_dict().items() if name in weights}
    linears = {name for name in weights if name.endswith(".weight") and name not in served}
    assert all(weights[name].ndim == 2 for name in linears)
    assert served.keys() == weights.keys() - linears
    for name, value in served.items():
        assert value.shape == weights[name].shape
        assert torch.equal(value.float(), weights[name].float()), name
        wide = weights[name].dtype == torch.float32
        assert value.dtype == (torch.float32 if wide or dtype == "float32" else torch.bfloat16), name


def test_linears_that_wan_keeps_in_float32(dit, open_engine, other_weights):
    """`time_embedder` is served and multiplied in float32, from what was sent in float32."""
    engine = open_engine(dit("wan"), quant="nvfp4")
    weights = other_weights("wan")
    engine.update_weights(weights, version="1")
    linear = engine.transformer.condition_embedder.time_embedder.linear_1
    sent = weights["condition_embedder.time_embedder.linear_1.weight"]
    assert sent.dtype == torch.float32
    assert (linear.weight.dtype, linear.bias.dtype) == (torch.float32, torch.float32)
    x = torch.randn(3, sent.shape[1], generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.linear(x, sent, weights["condition_embedder.time_embedder.linear_1.bias"])
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-6)


def test_a_persistent_buffer_is_swapped(tmp_path, open_engine):
    """SD3's position table is a buffer that checkpoints hold."""
    torch.manual_seed(0)
    model = transformer_class("SD3Transformer2DModel")(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    assert "pos_embed.pos_embed" not in dict(model.named_parameters())
    state["pos_embed.pos_embed"] = torch.randn_like(state["pos_embed.pos_embed"])
    engine = open_engine(tmp_path, quant="nvfp4")
    before = engine.digest()
    engine.update_weights(state, version="1")
    assert torch.equal(engine.transformer.pos_embed.pos_embed, state["pos_embed.pos_embed"])
    assert engine.digest() != before
    engine.sleep()
    engine.wake()
    with pytest.raises(CoverageError, match=r"pos_embed\.pos_embed"):
        engine.update_weights({name: w for name, w in state.items() if name != "pos_embed.pos_embed"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_a_model_under_training(dtype, model, quant, dit, open_engine, other_weights, snapshot):
    """`named_parameters()` with gradients, in float32 too: rounded to BF16 first, as an offline export would."""
    weights = other_weights(model)
    trained = diffusers_model(dit(model), weights).train()
    if dtype == torch.float32:
        with torch.no_grad():
            trained = trained.float()
            for parameter in trained.parameters():
                parameter.mul_(1 + 2**-11)  # below BF16's resolution, beside it
    assert all(parameter.requires_grad for parameter in trained.parameters())
    engine, other = (open_engine(dit(model, quant)) for _ in range(2))
    engine.update_weights(trained.named_parameters(), version="1")
    wide = {name for name, w in weights.items() if w.dtype == torch.float32}
    rounded = {
        name: parameter.detach() if name in wide else parameter.detach().bfloat16()
        for name, parameter in trained.named_parameters()
    }
    assert other.update_weights(rounded, version="1").digest == engine.digest()
    assert snapshot(engine) == snapshot(other)
    assert not any(parameter.requires_grad for parameter in engine.transformer.parameters())
