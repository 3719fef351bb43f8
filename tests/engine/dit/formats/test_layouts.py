"""How NVFP4 weights lie: said by the user, else by the file; never guessed."""

from __future__ import annotations

import json

import pytest
import torch

from rollmill.engine import ModelError, NVFP4Layout, UnsupportedError
from rollmill.engine.dit.formats import check_layout, open_transformer
from rollmill.engine.dit.transformer import transformer_class

LOW_LINEAR = NVFP4Layout("low_first", "linear")
LOW_TILES = NVFP4Layout("low_first", "128x4")
HIGH_LINEAR = NVFP4Layout("high_first", "linear")
HIGH_TILES = NVFP4Layout("high_first", "128x4")


def bits(value):
    return value.contiguous().view(-1).view(torch.uint8)


def assert_stored(opened, expected):
    seen = dict(opened.source)
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        assert (seen[name].dtype, seen[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(bits(seen[name]), bits(value)), name


def packed_names(tensors):
    return [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]


@pytest.fixture
def as_layout(swizzle):
    """Stored tensors -> a file's, in `layout`, rows of weights padded to a multiple of `pad`."""

    def convert(tensors, layout, pad=1):
        out = dict(tensors)
        for module in packed_names(tensors):
            codes = tensors[f"{module}.weight"]
            if layout.nibbles == "high_first":
                codes = (codes % 16) * 16 + codes // 16
            out[f"{module}.weight"] = torch.cat([codes, codes.new_zeros(-len(codes) % pad, codes.shape[1])])
            if layout.scales == "128x4":
                out[f"{module}.weight_scale"] = swizzle(tensors[f"{module}.weight_scale"])
        return out

    return convert


@pytest.fixture
def flux1(recorded):
    """Stored tensors and config of FLUX.1 in NVFP4; the shapes of all its scales admit tiles as well as rows."""
    return recorded.tensors("flux1-nvfp4"), recorded.config("flux1-nvfp4")


@pytest.fixture
def without_config(flux1):
    """The same folder, if ModelOpt had left nothing about itself."""
    tensors, config = flux1
    return tensors, {key: value for key, value in config.items() if key != "quantization_config"}


# recorded files


def test_the_comfy_file_dequantizes_to_its_truth_exactly(recorded, reader):
    """`truth_rows` holds comfy-kitchen's own float32 values, in the file's names: code x (block scale x scale_2)."""
    opened = open_transformer(recorded.comfy)
    assert opened.layout.nvfp4 == HIGH_TILES
    parts = {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
        "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
        "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
        "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.linear_out"],
        "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.linear_in"],
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
        **{f"single_blocks.{i}.linear1": [f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj"] for i in (0, 1)},
        **{f"single_blocks.{i}.linear2": [f"single_transformer_blocks.{i}.attn.to_out"] for i in (0, 1)},
    }
    truth = recorded.comfy_truth()
    assert {f"{name}.weight" for name in parts} == {name for name in truth if not name.endswith(".rows")}
    for name, modules in parts.items():
        ours = torch.cat([dequantized(opened, module, reader) for module in modules])
        rows = truth.get(f"{name}.weight.rows", torch.arange(len(ours)))
        assert torch.equal(ours[rows], truth[f"{name}.weight"]), name


def dequantized(opened, module, reader):
    codes, scales, scale_2 = (
        opened.source.get(f"{module}.{key}") for key in ("weight", "weight_scale", "weight_scale_2")
    )
    return reader.dequantize_nvfp4(codes, scales, scale_2, (len(codes), codes.shape[1] * 2))


def test_the_comfy_file_opens_without_a_flag(recorded, open_float32):
    engine = open_float32(recorded.comfy)
    assert engine.info()["quant"] == ["bf16", "nvfp4"]
    assert engine.info()["activation"] == ["static"]
    schemes = {m: s.scheme.name for s in engine._slots if "weight" in s.matrices for ms in s.modules for m in ms}
    text = {name: scheme for name, scheme in schemes.items() if ".attn.add_" in name}
    assert len(text) == 3
    assert set(text.values()) == {"bf16"}  # text qkv is stored in BF16


# what a file says


def test_modelopts_config_in_the_header(without_config, flux1, as_layout, layers_metadata, write_folder):
    tensors, config = without_config
    said = {"quantization_config": json.dumps(flux1[1]["quantization_config"])}
    opened = open_transformer(write_folder(as_layout(tensors, LOW_TILES), config, layers_metadata(tensors) | said))
    assert opened.layout.nvfp4 == LOW_TILES
    assert_stored(opened, tensors)


@pytest.fixture
def odd_rows(tiny, quantize_nvfp4, modelopt_config):
    """A model with 24 rows here and 40 there: padded to 32 and 48 in weights, to 128 in tiles of scales."""
    config = tiny("flux2")[0] | {"in_channels": 24, "joint_attention_dim": 48, "num_layers": 1, "num_single_layers": 1}
    torch.manual_seed(3)
    model = transformer_class("Flux2Transformer2DModel").from_config(config)
    tensors = {name: value.bfloat16() for name, value in model.state_dict().items()}
    stored = quantize_nvfp4(tensors, [["proj_out"], ["context_embedder"], ["norm_out.linear"]])
    return stored, config | modelopt_config("NVFP4")


def test_padding_is_cut_back_to_the_models_shape(odd_rows, as_layout, write_folder):
    """Tiles that do not fit linear rows tell themselves, with ModelOpt's config."""
    tensors, config = odd_rows
    assert tensors["proj_out.weight"].shape[0] == 24
    file = as_layout(tensors, LOW_TILES, pad=16)
    assert file["proj_out.weight"].shape[0] == 32
    assert file["proj_out.weight_scale"].shape == (128, 8)
    opened = open_transformer(write_folder(file, config))
    assert opened.layout.nvfp4 == LOW_TILES
    assert_stored(opened, tensors)


def test_padded_rows_with_linear_scales(odd_rows, as_layout, layers_metadata, write_folder):
    """Scales of 24 rows are not in tiles, whatever a list of layers stands for."""
    tensors, config = odd_rows
    opened = open_transformer(write_folder(as_layout(tensors, LOW_LINEAR, pad=16), config, layers_metadata(tensors)))
    assert opened.layout.nvfp4 == LOW_LINEAR
    assert_stored(opened, tensors)


def test_more_rows_than_padding_are_another_model(odd_rows, as_layout, write_folder):
    tensors, config = odd_rows
    file = as_layout(tensors, LOW_TILES, pad=16)
    file["proj_out.weight"] = torch.cat([file["proj_out.weight"]] * 3)[:80]
    opened = open_transformer(write_folder(file, config))
    with pytest.raises(ModelError, match=r"proj_out\.weight holds 80 x 96 NVFP4 values, but the model has 24 x 96"):
        list(opened.source)


def marker(**fields):
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def test_comfy_markers_say_high_nibble_and_tiles(without_config, as_layout, write_folder):
    tensors, config = without_config
    file = as_layout(tensors, HIGH_TILES)
    file |= {f"{module}.comfy_quant": marker(format="nvfp4") for module in packed_names(tensors)}
    opened = open_transformer(write_folder(file, config))
    assert opened.layout.nvfp4 == HIGH_TILES
    assert_stored(opened, tensors)


def test_diffusers_names_behind_comfys_prefix(without_config, as_layout, write_file, recorded, open_float32):
    """As Comfy stores models whose names diffusers kept."""
    tensors, _ = without_config
    file = as_layout(tensors, HIGH_TILES)
    file |= {f"{module}.comfy_quant": marker(format="nvfp4") for module in packed_names(tensors)}
    path = write_file({f"model.diffusion_model.{name}": value for name, value in file.items()})
    engine = open_float32(path, base=str(recorded("flux1-bf16")))
    assert engine.digest() == open_float32(recorded("flux1-nvfp4")).digest()


def test_quantized_files_open_in_bf16(recorded, reader, open_float32):
    """`quant="bf16"` dequantizes: the recorded truth, rounded."""
    engine = open_float32(recorded.comfy, quant="bf16")
    assert engine.info()["quant"] == ["bf16"]
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    (slot,) = [s for s in engine._slots if s.modules == ((name,),) and "weight" in s.matrices]
    truth = recorded.comfy_truth()["double_blocks.0.img_attn.proj.weight"].bfloat16().float()
    assert reader.relative_error(slot.tensors["0.weight"], truth) < 1e-4  # BF16 of values rounded once or twice


def test_markers_may_ask_for_unquantized_activations(without_config, as_layout, write_folder, open_float32):
    tensors, config = without_config
    file = as_layout(tensors, HIGH_TILES)
    for i, module in enumerate(sorted(packed_names(tensors))):
        file[f"{module}.comfy_quant"] = marker(format="nvfp4", full_precision_matrix_mult=i == 0)
    opened = open_transformer(folder := write_folder(file, config))
    assert opened.plan is not None
    assert opened.plan.layers == {min(packed_names(tensors)): "nvfp4_w4a16"}
    assert open_float32(folder).info()["activation"] == ["static"]


def test_a_missing_input_scale_means_scales_of_each_token(
    recorded, as_layout, write_file, open_float32, layers_metadata
):
    """The published `-mixed` file has none."""
    from safetensors.torch import load_file

    tensors = {n: t for n, t in load_file(recorded.comfy).items() if not n.endswith("input_scale")}
    engine = open_float32(write_file(tensors, layers_metadata(tensors)))
    assert engine.info()["activation"] == ["per_token"]
    assert engine.transformers["transformer"].resolver.plan.quant == "nvfp4"


# what it does not say


@pytest.mark.parametrize("listed", [False, True], ids=["silent", "layers listed"])
def test_a_silent_file_is_refused_with_every_reading(
    listed, without_config, layers_metadata, write_folder, open_float32
):
    tensors, config = without_config
    folder = write_folder(tensors, config, layers_metadata(tensors) if listed else None)
    with pytest.raises(UnsupportedError, match="neither ModelOpt's config") as refused:
        open_float32(folder)
    for layout in (LOW_LINEAR, LOW_TILES, HIGH_LINEAR, HIGH_TILES):
        say = f"EngineConfig(layout=NVFP4Layout(nibbles={layout.nibbles!r}, scales={layout.scales!r}))"
        assert say in str(refused.value)
    assert "check_layout" in str(refused.value)


@pytest.mark.parametrize("layout", [LOW_LINEAR, LOW_TILES, HIGH_LINEAR, HIGH_TILES], ids=str)
def test_a_silent_file_opens_with_a_layout(layout, without_config, as_layout, write_folder, recorded, open_float32):
    tensors, config = without_config
    engine = open_float32(write_folder(as_layout(tensors, layout), config), layout=layout)
    assert engine.digest() == open_float32(recorded("flux1-nvfp4")).digest()


def test_a_layout_is_honoured_over_what_the_file_says(flux1, as_layout, layers_metadata, write_folder):
    """ModelOpt's config says low nibble first."""
    tensors, config = flux1
    folder = write_folder(as_layout(tensors, HIGH_LINEAR), config, layers_metadata(tensors))
    assert_stored(open_transformer(folder, HIGH_LINEAR), tensors)
    assert open_transformer(folder).layout.nvfp4 == LOW_LINEAR


def test_a_layout_that_the_shapes_contradict_is_refused(recorded):
    with pytest.raises(UnsupportedError, match=r"EngineConfig\(layout=\.\.\.\) says NVFP4 scales in linear.*\n.*128x4"):
        open_transformer(recorded.comfy, HIGH_LINEAR)


def test_native_names_with_linear_scales_are_refused(recorded, write_file):
    from safetensors.torch import load_file

    tensors = load_file(recorded.comfy)
    for name in [n for n in tensors if n.endswith("weight_scale")]:
        rows, half = tensors[name.removesuffix("_scale")].shape
        tensors[name] = tensors[name][:rows, : half // 8]
    path = write_file(tensors)
    with pytest.raises(UnsupportedError, match=r"Comfy's files have NVFP4 scales in 128x4(.|\n)*scales='linear'"):
        open_transformer(path)
    assert open_transformer(path, HIGH_LINEAR).layout.nvfp4 == HIGH_LINEAR


def test_scales_of_mixed_orders_are_refused(odd_rows, as_layout, write_folder):
    tensors, config = odd_rows
    file = as_layout(tensors, LOW_TILES)
    file["proj_out.weight_scale"] = tensors["proj_out.weight_scale"]
    with pytest.raises(ModelError, match=r"neither all linear nor all in 128x4 tiles.*proj_out"):
        open_transformer(write_folder(file, config))


# formats that cannot be read, tensors that contradict each other


@pytest.mark.parametrize(
    ("leaf", "said"),
    [("qweight", "nunchaku"), ("wscales", "nunchaku"), ("svdquant_lora_a", "NVFP4_SVD"), ("pre_quant_scale", "AWQ")],
)
def test_foreign_formats_are_refused_by_name(leaf, said, flux1, write_folder):
    tensors, config = flux1
    tensors[f"transformer_blocks.0.attn.to_q.{leaf}"] = torch.zeros(4, 4)
    with pytest.raises(UnsupportedError, match=said):
        open_transformer(write_folder(tensors, config))


LAYER = "transformer_blocks.0.attn.to_q"
BROKEN = {
    "no weight_scale_2": ({"weight_scale_2": None}, ModelError, r"to_q: .*weight_scale_2 is missing"),
    "no weight_scale": (
        {"weight_scale": None},
        ModelError,
        r"to_q\.weight is stored in U8, and its weight_scale is missing",
    ),
    "no weight": ({"weight": None}, ModelError, r"to_q has .*, but no weight"),
    "MXFP8 scales": (
        {"weight_scale": torch.zeros(128, 4, dtype=torch.uint8)},
        UnsupportedError,
        "unknown layout(.|\n)*MXFP8",
    ),
    "INT8": ({"weight": torch.zeros(128, 128, dtype=torch.int8)}, UnsupportedError, r"to_q\.weight is stored in I8"),
    "E5M2": ({"weight": torch.zeros(128, 128).to(torch.float8_e5m2)}, UnsupportedError, "F8_E5M2"),
    "BF16 with a scale": ({"weight": torch.zeros(128, 128).bfloat16()}, ModelError, "stored in BF16, but has a scale"),
    "a bias in FP8": (
        {"bias": torch.zeros(128).to(torch.float8_e4m3fn)},
        ModelError,
        r"to_q\.bias is stored in F8_E4M3",
    ),
    "marked FP8": (
        {"comfy_quant": marker(format="float8_e4m3fn")},
        UnsupportedError,
        "FP8 .* with weight_scale F8_E4M3",
    ),
    "an unknown format": ({"comfy_quant": marker(format="int8_rowwise")}, UnsupportedError, "'int8_rowwise'"),
    "groups of 32": ({"comfy_quant": marker(format="nvfp4", group_size=32)}, UnsupportedError, "group_size 32"),
    "a marker that is no JSON": ({"comfy_quant": marker()[:1]}, ModelError, "comfy_quant is no valid JSON"),
}


@pytest.mark.parametrize(("changes", "error", "match"), BROKEN.values(), ids=BROKEN)
def test_tensors_that_contradict_each_other(changes, error, match, flux1, write_folder):
    tensors, config = flux1
    for leaf, value in changes.items():
        if value is None:
            del tensors[f"{LAYER}.{leaf}"]
        else:
            tensors[f"{LAYER}.{leaf}"] = value
    with pytest.raises(error, match=match):
        open_transformer(write_folder(tensors, config))


METADATA = {
    "no JSON": ("{", "no valid JSON"),
    "no object": ("[]", "is no JSON object"),
    "layers are a list": ('{"layers": []}', "layers is no JSON object"),
    "a layer that is not there": ('{"layers": {"blocks.9": {"format": "nvfp4"}}}', r"not in the file: blocks\.9"),
    "another format": (json.dumps({"layers": {LAYER: {"format": "fp8"}}}), "FP8 .* with weight_scale F8_E4M3"),
}


@pytest.mark.parametrize(("text", "match"), METADATA.values(), ids=METADATA)
def test_broken_metadata(text, match, flux1, write_folder):
    tensors, config = flux1
    with pytest.raises((ModelError, UnsupportedError), match=match):
        open_transformer(write_folder(tensors, config, {"_quantization_metadata": text}))


# the checker


@pytest.mark.parametrize("layout", [LOW_LINEAR, LOW_TILES, HIGH_LINEAR, HIGH_TILES], ids=str)
def test_the_checker_finds_the_layout(layout, without_config, as_layout, write_folder, recorded):
    tensors, config = without_config
    checked = check_layout(write_folder(as_layout(tensors, layout), config), recorded("flux1-bf16"))
    assert checked.fits == layout
    best, *others = checked.readings
    assert best.layout == layout
    assert best.correlation > 0.99
    assert len(others) == 3
    by_layout = {reading.layout: reading for reading in others}
    for other, reading in by_layout.items():  # scales in the wrong order stay near; nibbles do not
        assert reading.correlation < (0.96 if other.nibbles == layout.nibbles else 0.1)


def test_the_checker_reads_both_kinds_of_names(tiny, to_native, quantize_nvfp4, write_file, write_folder):
    config, tensors = tiny("flux2")
    stored = quantize_nvfp4(
        tensors, [["transformer_blocks.0.attn.to_out.0"], ["single_transformer_blocks.0.attn.to_out"]]
    )
    native = write_file(to_native("flux2", stored))
    for reference in (write_folder(tensors, config), write_file(to_native("flux2", tensors), name="bf16")):
        checked = check_layout(native, reference)
        assert checked.fits == HIGH_TILES
        assert checked.modules == ["transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.attn.to_out"]


def test_the_checker_claims_nothing_against_other_weights(recorded, copied, flux1):
    def change(tensors, config):
        for name in tensors:
            tensors[name] = torch.randn(tensors[name].shape).bfloat16()

    assert check_layout(recorded("flux1-nvfp4"), copied("flux1-bf16", change)).fits is None
    with pytest.raises(ModelError, match="holds no NVFP4"):
        check_layout(recorded("flux1-fp8"), recorded("flux1-bf16"))
    with pytest.raises(ModelError, match="is quantized itself"):
        check_layout(recorded("flux1-nvfp4"), recorded("flux1-fp8"))
    with pytest.raises(ModelError, match="another model"):
        check_layout(recorded("flux1-nvfp4"), recorded("wan-bf16"))
