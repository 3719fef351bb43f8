"""`FileLayer`: what the dtypes, shapes and markers of one module in a file tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

from msgspec import Struct

from ....quant import ModelError, QuantName, UnsupportedError
from ...headers import StoredTensor
from .files import WeightFiles

SIDE_TENSORS = ("weight_scale", "weight_scale_2", "input_scale", "comfy_quant")
FLOATS = ("BF16", "F16", "F32")
# What a header or a marker calls a layer's format -> what is stored.
FORMATS = {"nvfp4": "nvfp4", "float8_e4m3fn": "fp8", "fp8": "fp8"}
FOREIGN = {
    "qweight": "nunchaku (SVDQuant): tiles of one GPU kernel",
    "wscales": "nunchaku (SVDQuant): tiles of one GPU kernel",
    "svdquant_lora_a": "ModelOpt's NVFP4_SVD: a low-rank part beside every weight",
    "pre_quant_scale": "ModelOpt's AWQ or SVD: a factor a channel of the input",
}


class FileLayer(Struct, frozen=True):
    """A module whose weight is quantized. `tensors`: leaf -> header; `quant`: what is stored; `full_precision`: its
    marker asks for products with unquantized activations."""

    name: str
    tensors: Mapping[str, StoredTensor]
    quant: QuantName
    full_precision: bool = False

    @property
    def is_nvfp4(self) -> bool:
        return self.quant in ("nvfp4", "nvfp4_w4a16")

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.tensors[tensor].shape


class Marker(Struct, frozen=True):
    """What a header's list or a `comfy_quant` tensor says of one layer."""

    format: str
    full_precision: bool = False


def find_layers(files: WeightFiles, prefix: str) -> dict[str, FileLayer]:
    """Module (without `prefix`) -> layer, for every quantized weight of the files.

    `UnsupportedError`: a format that cannot be read, by name; `ModelError`: tensors that contradict each other.
    """
    tensors = {name.removeprefix(prefix): t for name, t in files.tensors.items() if name.startswith(prefix)}
    _refuse_foreign(tensors)
    markers = read_markers(files, prefix)
    grouped: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in SIDE_TENSORS or leaf == "weight":
            grouped.setdefault(module, {})[leaf] = tensor
        elif tensor.dtype not in FLOATS:
            raise ModelError(f"{name} is stored in {tensor.dtype}, and only weights of linears may be quantized")
    unmarked = sorted(markers.keys() - grouped.keys())
    if unmarked:
        raise ModelError(f"the header speaks of layers that are not in the file: {', '.join(unmarked[:6])}")
    found = {module: _layer(module, group, markers.get(module)) for module, group in grouped.items()}
    return {module: layer for module, layer in found.items() if layer is not None}


def read_markers(files: WeightFiles, prefix: str) -> dict[str, Marker]:
    """`_quantization_metadata` of the header, and `comfy_quant` tensors: uint8 bytes of a JSON object."""
    raw: dict[str, Any] = {}
    if "_quantization_metadata" in files.metadata:
        said = _parse(files.metadata["_quantization_metadata"], "_quantization_metadata of the header")
        layers = said.get("layers", {})
        if not isinstance(layers, Mapping):
            raise ModelError("_quantization_metadata of the header: layers is no JSON object")
        raw = {str(name).removeprefix(prefix): entry for name, entry in layers.items()}
    for name in files.tensors:
        if name.startswith(prefix) and name.endswith(".comfy_quant"):
            raw[name.removeprefix(prefix).removesuffix(".comfy_quant")] = _parse(bytes(files.read(name).tolist()), name)
    return {module: _marker(module, entry) for module, entry in raw.items()}


def _marker(module: str, entry: Any) -> Marker:
    if not isinstance(entry, Mapping) or entry.get("format") not in FORMATS:
        said = entry.get("format") if isinstance(entry, Mapping) else entry
        raise UnsupportedError(f"{module}: format {said!r:.80}", [f"known: {', '.join(FORMATS)}"])
    if entry["format"] == "nvfp4" and entry.get("group_size") not in (None, 16):
        raise UnsupportedError(f"{module}: group_size {entry['group_size']}", ["NVFP4 has groups of 16"])
    return Marker(FORMATS[entry["format"]], bool(entry.get("full_precision_matrix_mult")))


def _parse(text: str | bytes, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ModelError(f"{where} is no valid JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise ModelError(f"{where} is no JSON object")
    return found


def _refuse_foreign(tensors: Mapping[str, StoredTensor]) -> None:
    for name in tensors:
        leaf = name.rpartition(".")[2]
        if leaf in FOREIGN:
            raise UnsupportedError(
                f"{name}: {FOREIGN[leaf]}",
                ["give a BF16 checkpoint with quant='nvfp4', or an NVFP4 file of ModelOpt, Black Forest Labs or Comfy"],
            )


def _layer(module: str, tensors: Mapping[str, StoredTensor], marker: Marker | None) -> FileLayer | None:
    """None for a module in a float format."""
    weight = tensors.get("weight")
    if weight is None:
        raise ModelError(f"{module} has {', '.join(tensors)}, but no weight")
    quant = _quant(module, tensors, marker)
    if quant is None:
        if marker is not None or "weight_scale" in tensors:
            raise ModelError(
                f"{module}.weight is stored in {weight.dtype}, but has a scale or a marker of quantization"
            )
        return None
    if marker is not None and marker.format != quant.removesuffix("_channel"):
        raise ModelError(f"{module} is marked {marker.format}, but its tensors are those of {quant}")
    return FileLayer(module, tensors, quant, marker is not None and marker.full_precision)


def _quant(module: str, tensors: Mapping[str, StoredTensor], marker: Marker | None) -> QuantName | None:
    weight, scale = tensors["weight"], tensors.get("weight_scale")
    if weight.dtype in FLOATS:
        return None
    if weight.dtype not in ("F8_E4M3", "U8"):
        raise UnsupportedError(f"{module}.weight is stored in {weight.dtype}", ["known: BF16, FP8 E4M3, NVFP4 (U8)"])
    if scale is None:
        raise ModelError(
            f"{module}.weight is stored in {weight.dtype}, and its weight_scale is missing; without it the values "
            "are not known (a plain cast to FP8 has none): give a file with scales, or the BF16 weights"
        )
    if weight.dtype == "F8_E4M3" or marker is not None and marker.format == "fp8":
        return _fp8_quant(module, weight, scale)
    return _nvfp4_quant(module, weight, scale, "weight_scale_2" in tensors)


def _fp8_quant(module: str, weight: StoredTensor, scale: StoredTensor) -> QuantName:
    if scale.dtype in FLOATS and prod(scale.shape) == 1:
        return "fp8"
    if scale.dtype in FLOATS and len(weight.shape) > 1 and scale.shape in ((weight.shape[0],), (weight.shape[0], 1)):
        return "fp8_channel"
    raise UnsupportedError(
        f"{module}: FP8 {list(weight.shape)} with weight_scale {scale.dtype} {list(scale.shape)}",
        ["known: one float scale a tensor, or one a row"],
    )


def _nvfp4_quant(module: str, weight: StoredTensor, scale: StoredTensor, with_global: bool) -> QuantName:
    told = f"{module}: U8 {list(weight.shape)} with weight_scale {scale.dtype} {list(scale.shape)}"
    if scale.dtype == "F8_E4M3" and len(scale.shape) == len(weight.shape) == 2:
        if not with_global:
            raise ModelError(f"{told}: NVFP4, and its weight_scale_2 is missing")
        return "nvfp4"
    raise UnsupportedError(
        f"{told} is of an unknown layout",
        [
            "NVFP4 has 2-D scales in FP8 E4M3, and a weight_scale_2",
            "FP8 in a U8 container has one float scale, and a comfy_quant marker of format float8_e4m3fn",
            "uint8 scales (MXFP8) and INT8 weights cannot be read: give the BF16 weights",
        ],
    )
