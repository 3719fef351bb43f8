"""ModelOpt's header names layers whether it moved scales into tiles or not: shapes decide, else values, else nobody."""

from __future__ import annotations

import json

import pytest
import torch

from rollmill.engine import NVFP4Layout, UnsupportedError, inspect_checkpoint
from rollmill.engine.dit.formats import open_transformer
from rollmill.engine.dit.formats.files import WeightFiles
from rollmill.engine.dit.formats.layers import find_layers
from rollmill.engine.dit.formats.scale_order import find_scale_order
from rollmill.quant import NVFP4, WeightShape

ORDERS = ("linear", "128x4")
SCALE = ".weight_scale"


@pytest.fixture
def flux1(recorded):
    """All its scales admit tiles as well as rows."""
    return recorded.tensors("flux1-nvfp4"), recorded.config("flux1-nvfp4")


@pytest.fixture
def laid(swizzle):
    """`laid(tensors, "128x4")`: with the block scales in this order."""

    def convert(tensors, order):
        if order == "linear":
            return dict(tensors)
        return {name: swizzle(value) if name.endswith(SCALE) else value for name, value in tensors.items()}

    return convert


@pytest.fixture
def said(layers_metadata):
    """`said("list", tensors, config)`: the header that ModelOpt's options leave."""

    def make(what, tensors, config):
        listed = layers_metadata(tensors)
        whole = {"quantization_config": json.dumps(config["quantization_config"])}
        return {"list": listed, "config": whole, "both": listed | whole}[what]

    return make


def without_evidence(tensors):
    """Codes that have nothing to do with their scales."""
    generator = torch.Generator().manual_seed(5)
    made = dict(tensors)
    for name in tensors:
        if name.endswith(SCALE):
            codes = tensors[name.removesuffix("_scale")]
            made[name.removesuffix("_scale")] = torch.randint(256, codes.shape, dtype=torch.uint8, generator=generator)
    return made


def assert_scales(opened, tensors):
    for name, value in opened.source:
        if name.endswith(SCALE):
            assert torch.equal(value.view(torch.uint8), tensors[name].view(torch.uint8)), name


# whole files


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("header", ["list", "config", "both"])
def test_a_header_says_nothing_of_the_order(header, order, flux1, laid, said, write_folder):
    tensors, config = flux1
    opened = open_transformer(write_folder(laid(tensors, order), config, said(header, tensors, config)))
    assert opened.layout.nvfp4 == NVFP4Layout("low_first", order)
    assert_scales(opened, tensors)


def test_without_a_word_in_the_header_scales_lie_in_rows(flux1, write_folder):
    """A plain export: ModelOpt moves scales only where it writes into the header, too."""
    tensors, config = flux1
    tensors = without_evidence(tensors)
    assert_scales(open_transformer(write_folder(tensors, config, {"format": "pt"})), tensors)


@pytest.mark.parametrize("header", ["list", "config", "both"])
def test_neither_shapes_nor_values_decide(header, flux1, said, write_folder):
    tensors, config = flux1
    folder = write_folder(without_evidence(tensors), config, said(header, tensors, config))
    with pytest.raises(UnsupportedError, match="ModelOpt's header") as refused:
        open_transformer(folder)
    for order in ORDERS:
        assert f"EngineConfig(layout=NVFP4Layout(nibbles='low_first', scales='{order}'))" in str(refused.value)
    assert "high_first" not in str(refused.value)
    assert "check_layout" in str(refused.value)
    assert "--against" in str(refused.value)
    (warning,) = inspect_checkpoint(folder).warnings
    assert "ModelOpt's header" in warning
    for order in ORDERS:
        layout = NVFP4Layout("low_first", order)
        assert open_transformer(folder, layout).layout.nvfp4 == layout


@pytest.mark.parametrize("order", ORDERS)
def test_one_padded_layer_decides_for_the_whole_file(order, flux1, quantize_nvfp4, laid, said, write_folder):
    """64 rows: tiles would have 128."""
    tensors, config = flux1
    stored = without_evidence(quantize_nvfp4(tensors, [["proj_out"]]))
    assert stored["proj_out.weight_scale"].shape == (64, 8)
    opened = open_transformer(write_folder(laid(stored, order), config, said("both", stored, config)))
    assert opened.layout.nvfp4 == NVFP4Layout("low_first", order)
    assert_scales(opened, stored)


@pytest.mark.parametrize("name", ["wan-nvfp4", "wan-nvfp4-swizzled"])
def test_recorded_files_open_without_a_flag(name, recorded):
    order = "128x4" if name.endswith("swizzled") else "linear"
    opened = open_transformer(recorded(name))
    assert opened.layout.nvfp4 == NVFP4Layout("low_first", order)
    assert_scales(opened, recorded.tensors("wan-nvfp4"))


# values alone

ROWS, COLS = 512, 1024


def weights(kind):
    g = torch.Generator().manual_seed(11)
    normal = torch.randn(ROWS, COLS, generator=g)
    by_row, by_col = torch.randn(ROWS, 1, generator=g), torch.randn(1, COLS, generator=g)
    outliers = torch.ones(1, COLS)
    outliers[:, torch.randperm(COLS, generator=g)[:16]] = 20.0
    low_rank = torch.randn(ROWS, 8, generator=g) @ torch.randn(8, COLS, generator=g)
    return {
        "normal": normal,
        "rows of other sizes": normal * by_row.exp(),
        "columns of other sizes": normal * by_col.exp(),
        "rows and columns": normal * (by_row / 2).exp() * (by_col / 2).exp(),
        "heavy tails": normal.pow(3),
        "columns of outliers": normal * outliers,
        "low rank": low_rank + normal / 10,
        "growing": normal * torch.linspace(0.1, 3, ROWS)[:, None],
        "uniform": torch.rand(ROWS, COLS, generator=g),
        "nine in ten zero": normal * (torch.rand(ROWS, COLS, generator=g) < 0.1),
        "every fourth block": normal * torch.where(torch.arange(COLS) % 64 == 5, 11.0, 1.0),
        "signs": normal.sign() * by_row.exp(),
        "zeros": torch.zeros(ROWS, COLS),
    }[kind]


CLEAR = (
    "normal",
    "rows of other sizes",
    "columns of other sizes",
    "rows and columns",
    "heavy tails",
    "columns of outliers",
    "low rank",
    "growing",
)
UNCLEAR = ("uniform", "nine in ten zero", "every fourth block", "signs", "zeros")


@pytest.fixture
def order_of(laid, write_file):
    def find(weight, order):
        stored = NVFP4().quantize(weight.bfloat16(), WeightShape((weight.shape[0],), weight.shape[1]))
        tensors = {f"x.{key}": stored[key] for key in ("weight", "weight_scale", "weight_scale_2")}
        files = WeightFiles(write_file(laid(tensors, order)))
        return find_scale_order(files, "", list(find_layers(files, "").values()))

    return find


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", CLEAR)
def test_values_tell_the_order(kind, order, order_of):
    assert order_of(weights(kind), order) == order


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", UNCLEAR)
def test_values_that_do_not_tell_are_not_asked_to(kind, order, order_of):
    assert order_of(weights(kind), order) is None


def test_a_handful_of_blocks_tells_nothing(order_of):
    assert order_of(weights("normal")[:128, :64], "linear") is None
