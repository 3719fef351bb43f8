"""`StoredTransformer`: one transformer's weights in canonical form, whatever file they came from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct

from ....quant import QuantPlan, read_quant_plan
from ...checkpoint import read_json
from ...config import NVFP4Layout
from ..transformer import empty_model
from .canonical import CanonicalSource
from .files import WeightFiles
from .layers import FLOATS, FileLayer, find_layers
from .layout import Evidence, FileLayout, decide_layout
from .native import check_others, find_names, leaf_of, place_module, unknown_names
from .native_config import infer_config
from .plan import make_plan
from .scale_order import find_scale_order


class StoredTransformer(Struct, frozen=True):
    """`config`: diffusers' config.json; `source`: stored tensors in diffusers' names, low nibble = even k, linear
    scales; `tensor_names`: theirs; `plan`: which module is stored how, None if all are BF16; `layout`: how the file
    itself calls and lays them."""

    config: Mapping[str, Any]
    source: CanonicalSource
    tensor_names: frozenset[str]
    plan: QuantPlan | None
    layout: FileLayout


class FileSummary(Struct, frozen=True):
    """What headers tell. `layers`: quantized modules by the file's names; `said`: ModelOpt's config, where there is
    one; `config`: diffusers' config beside the weights."""

    files: WeightFiles
    layers: Mapping[str, FileLayer]
    layout: FileLayout
    said: QuantPlan | None
    config: Mapping[str, Any] | None


def open_transformer(
    place: Path, layout: NVFP4Layout | None = None, config: Mapping[str, Any] | None = None
) -> StoredTransformer:
    """Open a transformer folder of diffusers or a file; no weight is read before `source` is asked.

    The diffusers config is the one beside the weights, else `config` (the base model's), else told by the shapes of a
    file in Black Forest Labs' names.
    """
    found = summarize(place, layout)
    config = find_config(found, config)
    if config is None:
        raise unknown_names(found.files.tensors)
    shapes = _model_shapes(config) if needs_shapes(found.layout) else {}
    source = CanonicalSource(found.files, found.layout, found.layers, shapes)
    names = found.layout.names
    stored = {target: layer for name, layer in found.layers.items() for target in place_module(name, names).modules}
    plan = make_plan(stored, _float_matrices(found.files, found.layout, found.layers), found.said)
    return StoredTransformer(config, source, frozenset(source.names()), plan, found.layout)


def summarize(place: Path, layout: NVFP4Layout | None = None) -> FileSummary:
    """Read the headers of a folder or file, and some rows where only values tell the layout; `layout`: as the user
    says it."""
    files = WeightFiles(place)
    names, prefix = find_names(files.tensors)
    check_others(files.tensors, prefix)
    layers = find_layers(files, prefix)
    config = config_beside(place)
    said = read_modelopt_plan(place, config, files.metadata)
    evidence = Evidence(
        names,
        modelopt=said is not None,
        post_processed=not files.metadata.keys().isdisjoint(("quantization_config", "_quantization_metadata")),
        comfy=any(name.endswith(".comfy_quant") for name in files.tensors),
    )
    nvfp4 = decide_layout(layers, evidence, layout, partial(find_scale_order, files, prefix))
    found = FileLayout(names, prefix, nvfp4)
    return FileSummary(files, layers, found, said, config)


def find_config(found: FileSummary, base: Mapping[str, Any] | None = None) -> Mapping[str, Any] | None:
    """The config beside the weights, else `base`, else what shapes tell; None where nothing does."""
    config = found.config or base
    if config is not None or found.layout.names == "diffusers":
        return config
    return infer_config(found.layout.names, _weight_shapes(found.files, found.layout, found.layers))


def config_beside(place: Path) -> Mapping[str, Any] | None:
    """The diffusers config in a folder, or beside a file."""
    path = (place if place.is_dir() else place.parent) / "config.json"
    found = read_json(path) if path.is_file() else {}
    return found if "_class_name" in found else None


def read_modelopt_plan(place: Path, config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> QuantPlan | None:
    """What ModelOpt's config says, in config.json, hf_quant_config.json or the header."""
    folder = place if place.is_dir() else place.parent
    kept = {key: value for key, value in metadata.items() if key == "quantization_config"}
    return read_quant_plan(folder, config or {}, kept)


def needs_shapes(layout: FileLayout) -> bool:
    """Whether weights may be padded or packed, so that the model must tell where they end."""
    return layout.names != "diffusers" or layout.nvfp4 is not None


def _model_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of every parameter of the diffusers model; nothing is allocated."""
    return {name: tuple(value.shape) for name, value in empty_model(config).named_parameters()}


def _weight_shapes(
    files: WeightFiles, layout: FileLayout, layers: Mapping[str, FileLayer]
) -> dict[str, tuple[int, ...]]:
    """Module of the file -> [rows, cols] of its weight, two values a byte where it is NVFP4."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in files.tensors.items():
        module, _, leaf = name.removeprefix(layout.prefix).rpartition(".")
        if name.startswith(layout.prefix) and leaf_of(leaf, layout.names) == "weight":
            packed = module in layers and layers[module].is_nvfp4
            shapes[module] = (tensor.shape[0], tensor.shape[1] * 2) if packed else tensor.shape
    return shapes


def _float_matrices(files: WeightFiles, layout: FileLayout, layers: Collection[str]) -> list[str]:
    """Diffusers modules whose weight is a matrix in a float format."""
    found: list[str] = []
    for name, tensor in files.tensors.items():
        module, _, leaf = name.removeprefix(layout.prefix).rpartition(".")
        is_matrix = leaf == "weight" and len(tensor.shape) > 1 and tensor.dtype in FLOATS
        if name.startswith(layout.prefix) and is_matrix and module not in layers:
            found += place_module(module, layout.names).modules
    return found
