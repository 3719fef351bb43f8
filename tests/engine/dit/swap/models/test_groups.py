"""Which linears share an amax: those that diffusers' own forward calls with the very same tensor."""

from __future__ import annotations

import pytest

from rollmill.engine.dit.groups import sibling_linears

MODELS = ["flux1", "flux2", "wan", "wan-i2v", "sd3", "qwen"]
OTHERS = ["pixart", "sana", "ltx", "cogvideox", "auraflow", "lumina2", "hunyuan-video", "chroma", "z-image"]


@pytest.mark.parametrize("name", MODELS + OTHERS)
def test_groups_are_what_a_forward_shows(name, plain_model, groups_seen):
    model = plain_model(name)
    found = list(sibling_linears(model))
    assert {tuple(sorted(group)) for group, _ in found if len(group) > 1} == groups_seen(name, model) != set()
    listed = [path for group, _ in found for path in group]
    assert len(listed) == len(set(listed)), "a linear belongs to one group"


@pytest.mark.parametrize(
    ("name", "attention", "fused"),
    [
        ("flux1", "transformer_blocks.0.attn", {"to_qkv": 3, "to_added_qkv": 3}),
        ("flux1", "single_transformer_blocks.0.attn", {"to_qkv": 3}),
        ("wan-i2v", "blocks.0.attn1", {"to_qkv": 3}),
        ("wan-i2v", "blocks.0.attn2", {"to_kv": 2, "to_added_kv": 2}),
        ("sd3", "transformer_blocks.0.attn2", {"to_qkv": 3}),
    ],
)
def test_fused_names_are_diffusers_own(name, attention, fused, plain_model):
    model = plain_model(name)
    ours = {
        form.removeprefix(f"{attention}."): len(group)
        for group, form in sibling_linears(model)
        if form and form.startswith(f"{attention}.")
    }
    assert ours == fused
    model.fuse_qkv_projections()
    made = {child for child, _ in model.get_submodule(attention).named_children()}
    assert fused.keys() <= made
