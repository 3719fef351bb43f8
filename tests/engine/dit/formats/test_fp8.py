"""FP8 files: one scale a row, U8 containers, modules that stay unquantized, scales that are missing."""

from __future__ import annotations

import json

import pytest
import torch

from rollmill.engine import ModelError, UnsupportedError
from rollmill.engine.dit.formats import open_transformer

KEPT = "transformer_blocks.0.ff.net.2"


def served(engine):
    """Module -> (scheme, dequantized weight)."""
    found = {}
    for slot in engine._slots:
        if "weight" in slot.matrices:
            for module in slot.modules[0]:
                found[module.removeprefix("transformer.")] = slot.scheme
    return found


def output(engine, recorded, reader):
    with torch.no_grad():
        return engine.transformer(**reader.inputs_of(recorded.io("flux1-fp8")), return_dict=False)[0]


def rows_scaled(shape):
    """`[N]` or `[N, 1]`: the tensor's scale in every row."""

    def edit(tensors, config):
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            rows = len(tensors[name.removesuffix("_scale")])
            tensors[name] = tensors[name].expand(rows).reshape(shape(rows)).clone()

    return edit


@pytest.mark.parametrize("shape", [lambda n: (n,), lambda n: (n, 1)], ids=["[N]", "[N, 1]"])
def test_one_scale_a_row(shape, recorded, copied, reader, open_float32):
    """ModelOpt's config says FP8; the shapes of the scales are what is stored."""
    engine = open_float32(copied("flux1-fp8", rows_scaled(shape)))
    assert engine.transformers["transformer"].resolver.plan.quant == "fp8_channel"
    schemes = served(engine)
    assert {s.per_channel for s in schemes.values() if s.name == "fp8"} == {True}
    expected = output(open_float32(recorded("flux1-fp8")), recorded, reader)
    assert reader.relative_error(output(engine, recorded, reader), expected) < 1e-6


def test_rows_of_unequal_scale(recorded, copied, reader, open_float32):
    """Codes doubled, scales halved in some rows: the same values."""
    name = "single_transformer_blocks.0.proj_mlp"
    changed = {}

    def edit(tensors, config):
        rows_scaled(lambda n: (n,))(tensors, config)
        weight = tensors[f"{name}.weight"].float()
        rows = torch.arange(len(weight)) % 3 == 0
        weight[rows] /= 2
        tensors[f"{name}.weight"] = weight.to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"][rows] *= 2
        changed.update(codes=tensors[f"{name}.weight"].float(), scale=tensors[f"{name}.weight_scale"])

    folder = copied("flux1-fp8", edit)
    source = open_transformer(folder).source
    read = source.get(f"{name}.weight").float() * source.get(f"{name}.weight_scale")[:, None]
    assert torch.equal(read, changed["codes"] * changed["scale"][:, None])
    expected = output(open_float32(recorded("flux1-fp8")), recorded, reader)
    assert reader.relative_error(output(open_float32(folder), recorded, reader), expected) < 1e-2  # subnormals round


def marker(**fields):
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def as_bytes(tensors):
    """F8 weights in U8 containers."""
    for name in [n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn]:
        tensors[name] = tensors[name].view(torch.uint8)


def test_uint8_containers_with_markers(recorded, copied, open_float32):
    def edit(tensors, config):
        as_bytes(tensors)
        del config["quantization_config"]
        for name in [n for n in tensors if n.endswith(".weight_scale")]:
            tensors[name.replace("weight_scale", "comfy_quant")] = marker(format="float8_e4m3fn")

    engine = open_float32(copied("flux1-fp8", edit))
    assert engine.digest() == open_float32(recorded("flux1-fp8")).digest()


def test_uint8_containers_that_the_header_lists(recorded, copied, layers_metadata, open_float32):
    metadata = layers_metadata(recorded.tensors("flux1-fp8"), "float8_e4m3fn")
    engine = open_float32(copied("flux1-fp8", lambda tensors, config: as_bytes(tensors), metadata))
    assert engine.digest() == open_float32(recorded("flux1-fp8")).digest()


def test_uint8_that_nothing_explains_is_refused(copied):
    folder = copied("flux1-fp8", lambda tensors, config: as_bytes(tensors))
    with pytest.raises(UnsupportedError, match="unknown layout(.|\n)*FP8 in a U8 container"):
        open_transformer(folder)


def test_markers_that_ask_for_full_precision_products(recorded, copied, open_float32):
    """FP8 widens to BF16: the layer is computed unquantized."""

    def edit(tensors, config):
        tensors[f"{KEPT}.comfy_quant"] = marker(format="float8_e4m3fn", full_precision_matrix_mult=True)

    schemes = served(open_float32(copied("flux1-fp8", edit)))
    assert schemes[KEPT].name == "bf16"
    assert schemes["transformer_blocks.0.ff.net.0.proj"].name == "fp8"


@pytest.mark.parametrize("scales", ["tensor", "rows"])
def test_fp8_weights_of_modules_that_stay_unquantized(scales, recorded, copied, open_float32):
    """The config's `ignore` keeps a module that is stored in FP8: it is dequantized, with its scale."""

    def edit(tensors, config):
        config["quantization_config"]["ignore"] += [KEPT, "*.norm1.linear"]
        if scales == "rows":
            rows_scaled(lambda n: (n,))(tensors, config)

    engine = open_float32(copied("flux1-fp8", edit))
    stored = recorded.tensors("flux1-fp8")
    linears = served(engine)
    assert linears[KEPT].name == linears["transformer_blocks.0.norm1.linear"].name == "bf16"
    assert linears["transformer_blocks.0.norm1_context.linear"].name == "fp8"
    (slot,) = [s for s in engine._slots if s.modules == ((f"transformer.{KEPT}",),) and "weight" in s.matrices]
    expected = stored[f"{KEPT}.weight"].float() * stored[f"{KEPT}.weight_scale"]
    assert torch.equal(next(iter(slot.tensors.values())), expected.bfloat16().float())


def test_nvfp4_weights_of_modules_that_stay_unquantized(recorded, copied, reader, open_float32):
    def edit(tensors, config):
        config["quantization_config"]["ignore"].append(KEPT)

    engine = open_float32(copied("flux1-nvfp4", edit))
    (slot,) = [s for s in engine._slots if s.modules == ((f"transformer.{KEPT}",),) and "weight" in s.matrices]
    stored = recorded.tensors("flux1-nvfp4")
    codes, scales, scale_2 = (stored[f"{KEPT}.{key}"] for key in ("weight", "weight_scale", "weight_scale_2"))
    expected = reader.dequantize_nvfp4(codes, scales, scale_2, (len(codes), codes.shape[1] * 2), "flashinfer")
    served_weight = next(iter(slot.tensors.values()))
    assert torch.equal(served_weight, expected.bfloat16().float())


def test_weights_in_bf16_stay_so_whatever_the_config_says(recorded, copied, open_float32):
    """As in `-mixed` files, which keep more than the config's list."""

    def edit(tensors, config):
        for leaf in ("weight_scale", "input_scale"):
            del tensors[f"{KEPT}.{leaf}"]
        tensors[f"{KEPT}.weight"] = recorded.tensors("flux1-bf16")[f"{KEPT}.weight"]

    schemes = served(open_float32(copied("flux1-fp8", edit)))
    assert schemes[KEPT].name == "bf16"
    assert schemes["transformer_blocks.0.ff_context.net.2"].name == "fp8"


@pytest.mark.parametrize("module", [KEPT, "proj_out"], ids=["quantized", "ignored"])
def test_a_missing_weight_scale_is_an_error(module, copied):
    """Raw codes are no weights: a plain cast to FP8 cannot be told from a lost scale."""

    def edit(tensors, config):
        tensors.pop(f"{module}.weight_scale", None)
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].to(torch.float8_e4m3fn)

    name = f"{module}.weight".replace(".", r"\.")
    with pytest.raises(ModelError, match=f"{name} is stored in F8_E4M3, and its weight_scale is missing"):
        open_transformer(copied("flux1-fp8", edit))


@pytest.mark.parametrize("scale", [torch.ones(128, 4), torch.ones(7)], ids=["blocks", "another count"])
def test_other_scales_are_refused(scale, copied):
    def edit(tensors, config):
        tensors[f"{KEPT}.weight_scale"] = scale

    with pytest.raises(UnsupportedError, match="one float scale a tensor, or one a row"):
        open_transformer(copied("flux1-fp8", edit))


def test_a_config_of_quantized_weights_over_bf16_is_refused(recorded, copied):
    def edit(tensors, config):
        config["quantization_config"] = recorded.config("flux1-fp8")["quantization_config"]

    with pytest.raises(ModelError, match="config says fp8, but every weight is stored in a float format"):
        open_transformer(copied("flux1-bf16", edit))


def test_a_foreign_quantization_config_is_refused(copied):
    def edit(tensors, config):
        config["quantization_config"] = {"quant_method": "bitsandbytes"}

    with pytest.raises(UnsupportedError, match="bitsandbytes"):
        open_transformer(copied("flux1-bf16", edit))
