"""Black Forest Labs' key names become diffusers', bit for bit, in BF16, FP8 and NVFP4."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import CoverageError, ModelError, UnsupportedError
from rollmill.engine.dit.formats import open_transformer

PREFIX = "model.diffusion_model."


def assert_stored(opened, expected):
    """The source yields exactly `expected`, in one pass and one by one."""
    assert opened.tensor_names == expected.keys()
    seen = {name: value.clone() for name, value in opened.source}
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        for ours in (seen[name], opened.source.get(name)):
            assert ours.dtype == value.dtype, name
            assert ours.shape == value.shape, name
            assert torch.equal(bits(ours), bits(value)), name


def bits(value):
    return value.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["bare", "prefixed"])
@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_bf16_equals_diffusers_bit_for_bit(family, prefix, tiny, to_native, write_file, write_folder, open_float32):
    config, tensors = tiny(family)
    path = write_file(to_native(family, tensors, prefix))
    opened = open_transformer(path)
    assert_stored(opened, tensors)
    assert opened.plan is None
    assert (opened.layout.names, opened.layout.prefix, opened.layout.nvfp4) == (family, prefix, None)
    assert opened.config == config
    assert open_float32(path).digest() == open_float32(write_folder(tensors, config)).digest()


def test_flux2_equals_diffusers_own_converter(tiny, to_native, write_file):
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    native = to_native("flux2", tiny("flux2")[1])
    assert_stored(open_transformer(write_file(native)), convert_flux2_transformer_checkpoint_to_diffusers(dict(native)))


def test_recorded_flux1_with_the_base_models_config(recorded, to_native, write_file, open_float32):
    """Heads of 64: how rotary embeddings share them does not show in the file."""
    path = write_file(to_native("flux1", recorded.tensors("flux1-bf16")))
    with pytest.raises(UnsupportedError, match=r"axes_dims_rope.*\n.*\n.*base="):
        open_transformer(path)
    for base in (recorded("flux1-bf16"), recorded("flux1-bf16").parent):
        engine = open_float32(path, base=str(base))
        assert engine.digest() == open_float32(recorded("flux1-bf16")).digest()


def test_a_folder_of_native_names_reads_the_config_in_it(recorded, to_native, write_folder):
    config = recorded.config("flux1-bf16")
    opened = open_transformer(write_folder(to_native("flux1", recorded.tensors("flux1-bf16")), config))
    assert opened.config == config
    assert_stored(opened, recorded.tensors("flux1-bf16"))


def groups_of(tensors):
    """Linears that ModelOpt gives one global scale: q, k, v; the others alone."""
    found = []
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if name == module or value.ndim != 2 or value.shape[1] % 16:
            continue
        if module.endswith((".to_k", ".to_v", ".add_k_proj", ".add_v_proj")):
            continue
        if module.endswith((".to_q", ".add_q_proj")):
            found.append([module.replace("_q", f"_{x}") for x in "qkv"])
        else:
            found.append([module])
    return found


@pytest.mark.parametrize(
    "kept", [["x_embedder"], ["x_embedder", "transformer_blocks.*.attn.add_*_proj"]], ids=["all", "text"]
)
def test_nvfp4_equals_modelopts_file_of_the_same_weights(
    kept, tiny, to_native, quantize_nvfp4, modelopt_config, layers_metadata, write_file, write_folder, open_float32
):
    """High nibble first, tiles, packed qkv of 3 x 96 rows (cut inside a tile), swapped halves: all undone."""
    from rollmill.quant import matches_any

    config, tensors = tiny("flux2")
    groups = [group for group in groups_of(tensors) if not matches_any(group[0], kept)]
    stored = quantize_nvfp4(tensors, groups)
    native = to_native("flux2", stored)
    path = write_file(native, layers_metadata(native))
    opened = open_transformer(path)
    assert_stored(opened, stored)
    assert opened.config == config
    assert str(opened.layout) == "flux2 names, NVFP4 high nibble first, scales 128x4"
    folder = write_folder(stored, config | modelopt_config("NVFP4", kept))
    assert open_float32(path).digest() == open_float32(folder).digest()


def share_scales(tensors, groups):
    """Give every group the scales of its first module: what a packed weight has."""
    for first, *others in groups:
        for module in others:
            for leaf in ("weight_scale_2", "input_scale", "weight_scale"):
                name = f"{module}.{leaf}"
                if name in tensors and tensors[name].ndim == 0:
                    tensors[name] = tensors[f"{first}.{leaf}"].clone()


def packed_groups(tensors):
    """Modules of FLUX.1 that one weight packs."""
    for name in list(tensors):
        if name.endswith((".attn.to_q.weight", ".attn.add_q_proj.weight")):
            module = name.removesuffix(".weight")
            mlp = [module.replace("attn.to_q", "proj_mlp")] if module.startswith("single") else []
            yield [module.replace("_q", f"_{x}") for x in "qkv"] + mlp


@pytest.mark.parametrize("name", ["flux1-nvfp4", "flux1-fp8"])
def test_recorded_flux1_in_native_names(name, recorded, copied, to_native, layers_metadata, write_file, open_float32):
    """linear1 is q, k, v and the MLP: split by rows of unequal number."""
    stored = recorded.tensors(name)
    share_scales(stored, list(packed_groups(stored)))
    folder = copied(name, lambda tensors, config: tensors.update(stored))
    native = to_native("flux1", stored)
    path = write_file(native, layers_metadata(native, name.split("-")[1]))
    base = str(recorded("flux1-bf16"))
    assert_stored(open_transformer(path, config=recorded.config("flux1-bf16")), stored)
    assert open_float32(path, base=base).digest() == open_float32(folder).digest()


def test_scales_of_rows_are_split_with_the_rows(recorded, to_native, write_file):
    stored = recorded.tensors("flux1-fp8")
    share_scales(stored, list(packed_groups(stored)))
    for name in [name for name in stored if name.endswith(".weight_scale")]:
        rows = len(stored[name.removesuffix("_scale")])
        stored[name] = torch.rand(rows) + 0.5
    opened = open_transformer(write_file(to_native("flux1", stored)), config=recorded.config("flux1-bf16"))
    assert_stored(opened, stored)
    assert opened.plan is not None
    assert opened.plan.quant == "fp8_channel"


# what cannot be


def test_a_missing_module_is_named(tiny, to_native, write_file):
    native = to_native("flux2", tiny("flux2")[1])
    del native["time_in.in_layer.weight"]
    with pytest.raises(ModelError, match=r"without time_in\.in_layer"):
        open_transformer(write_file(native))


def test_gaps_between_blocks_are_named(tiny, to_native, write_file):
    native = {
        n.replace("single_blocks.1.", "single_blocks.4."): t for n, t in to_native("flux2", tiny("flux2")[1]).items()
    }
    with pytest.raises(ModelError, match=r"single_blocks: numbers \[0, 4\] have gaps"):
        open_transformer(write_file(native))


def test_a_packed_weight_of_another_size_is_refused(tiny, to_native, write_file):
    native = to_native("flux2", tiny("flux2")[1])
    native["double_blocks.1.img_attn.qkv.weight"] = native["double_blocks.1.img_attn.qkv.weight"][:-3]
    opened = open_transformer(write_file(native))
    with pytest.raises(ModelError, match="has 285 rows, but .*to_q .* have 288"):
        list(opened.source)


def test_an_unknown_name_reaches_the_ledger(tiny, to_native, write_file, open_float32):
    native = to_native("flux2", tiny("flux2")[1]) | {"double_blocks.0.img_attn.gate.weight": torch.ones(4)}
    with pytest.raises(CoverageError, match=r"double_blocks\.0\.img_attn\.gate\.weight"):
        open_float32(write_file(native))


def test_other_components_of_a_comfy_file_are_left_to_the_base_model(tiny, to_native, write_file):
    native = to_native("flux2", tiny("flux2")[1], PREFIX)
    others = {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.x.weight": torch.ones(2)}
    assert_stored(open_transformer(write_file(native | others)), tiny("flux2")[1])
    with pytest.raises(ModelError, match=r"with and without model\.diffusion_model\..*: img_out\.weight"):
        open_transformer(write_file(native | {"img_out.weight": torch.ones(2)}, name="odd"))


def test_names_of_no_known_model(write_file):
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.self_attn\.q\.weight(.|\n)*EngineConfig\(base="):
        open_transformer(write_file({"blocks.0.self_attn.q.weight": torch.ones(2, 2)}))
