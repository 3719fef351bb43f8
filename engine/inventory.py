"""What a checkpoint holds, from its configs and the headers of its files: no tensor is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ..quant import QuantPlan, RollmillError
from .checkpoint import Checkpoint, is_diffusers, locate
from .dit.checkpoint import parts_of
from .dit.formats import FileSummary, WeightFiles, find_config, say, summarize
from .headers import StoredTensor, read_header

# What a tensor is called below its module; a name with another ending is a tensor without a module (stacked experts).
TENSORS = ("weight", "bias", "weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale", "comfy_quant")
QUANTIZED = ("F8_E4M3", "U8")


class StoredModule(Struct, frozen=True):
    """A module's tensors. `scheme`: bf16 (or another float), fp8, fp8_channel, nvfp4, nvfp4_w4a16, or what is odd;
    `packing`: how the NVFP4 weights of a diffusion file lie."""

    name: str
    scheme: str
    weights: int
    bytes: int
    tensors: dict[str, StoredTensor]
    packing: str | None = None

    @property
    def is_quantized(self) -> bool:
        return "weight" in self.tensors and self.tensors["weight"].dtype in QUANTIZED

    @property
    def is_matrix(self) -> bool:
        return "weight" in self.tensors and len(self.tensors["weight"].shape) > 1


class Total(Struct):
    """Sums over the modules of one scheme; `static` counts those with an input_scale."""

    modules: int = 0
    weights: int = 0
    bytes: int = 0
    static: int = 0


class Inventory(Struct, frozen=True):
    """`quant`: what the config says ("mixed": module by module; None: not quantized); `kept`: matrices left in a float
    format by a quantized checkpoint; `totals`: by scheme."""

    path: str
    architectures: list[str]
    quant: str | None
    kv_cache: str | None
    files: int
    modules: list[StoredModule]
    kept: list[str]
    totals: dict[str, Total]
    weights: int
    bytes: int
    warnings: list[str]


def inspect_checkpoint(path: str | Path) -> Inventory:
    """Read the headers of a folder or hub id in Hugging Face layout (BF16, or ModelOpt's FP8, NVFP4 or mixed), of a
    diffusion pipeline's transformers, or of a file of diffusion weights."""
    if is_diffusers(path):
        return _inspect_diffusion(locate(path))
    checkpoint, warnings = Checkpoint(path), []
    try:
        plan = checkpoint.quant_plan()
    except RollmillError as error:  # there is more to see than a config that we cannot serve
        plan = None
        warnings.append(str(error))
    modules = [_module(name, tensors, plan) for name, tensors in _group(_tensors(checkpoint.source.files))]
    kv_cache = None if plan is None else plan.kv_cache
    warnings += _disagreements(modules, plan)
    files = len(checkpoint.source.files)
    said = [_said(plan)]
    return _inventory(checkpoint.folder, checkpoint.architectures, said, kv_cache, files, modules, warnings)


def _inspect_diffusion(place: Path) -> Inventory:
    """Every transformer of a pipeline; a module is called as its file calls it, behind its component's name."""
    architectures: list[str] = []
    modules: list[StoredModule] = []
    warnings: list[str] = []
    said: list[str | None] = []
    files = 0
    parts = parts_of(place) or {"": place}
    for component, part in parts.items():
        try:
            found = summarize(part)
        except RollmillError as error:  # what the headers hold can be listed all the same
            warnings.append(f"{part}: {error}")
            listed, paths = _unread(part)
        else:
            paths = found.files.paths
            said.append(_said(found.said))
            listed = [_layer_module(name, tensors, found) for name, tensors in _group(found.files.tensors.items())]
            warnings += [] if found.said is None else _disagreements(listed, found.said)
            architectures.append(str((find_config(found) or {}).get("_class_name", "unknown model")))
        files += len(paths)
        prefix = f"{component}." if len(parts) > 1 else ""
        modules += [replace(module, name=f"{prefix}{module.name}") for module in listed]
    return _inventory(place, architectures, said, None, files, modules, warnings)


def _unread(place: Path) -> tuple[list[StoredModule], Sequence[Path]]:
    """The modules of files that cannot be served, as far as shapes tell."""
    files = WeightFiles(place)
    return [_module(name, tensors, None) for name, tensors in _group(files.tensors.items())], files.paths


def _layer_module(name: str, tensors: Mapping[str, StoredTensor], found: FileSummary) -> StoredModule:
    layer = found.layers.get(name.removeprefix(found.layout.prefix))
    module = _module(name, tensors, found.said)
    if layer is None:
        return module
    nvfp4 = found.layout.nvfp4 if layer.is_nvfp4 else None
    packing = None if nvfp4 is None else say(nvfp4)
    scheme = module.scheme if module.scheme == "nvfp4_w4a16" else layer.quant
    weights = prod(layer.shape("weight")) * (2 if layer.is_nvfp4 else 1)
    return replace(module, scheme=scheme, weights=weights, packing=packing)


def _inventory(
    place: Path,
    architectures: list[str],
    said: Sequence[str | None],
    kv_cache: str | None,
    files: int,
    modules: list[StoredModule],
    warnings: list[str],
) -> Inventory:
    quantized = any(said) or any(module.is_quantized for module in modules)
    return Inventory(
        path=str(place),
        architectures=architectures,
        quant=said[0] if len(set(said)) == 1 else "mixed" if said else None,
        kv_cache=kv_cache,
        files=files,
        modules=modules,
        kept=[m.name for m in modules if m.is_matrix and not m.is_quantized] if quantized else [],
        totals=_totals(modules),
        weights=sum(module.weights for module in modules),
        bytes=sum(module.bytes for module in modules),
        warnings=warnings,
    )


def _said(plan: QuantPlan | None) -> str | None:
    return None if plan is None else "mixed" if plan.layers or plan.patterns else plan.quant


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, StoredTensor]]:
    for file in files:
        yield from read_header(file)


def _group(tensors: Iterable[tuple[str, StoredTensor]]) -> list[tuple[str, dict[str, StoredTensor]]]:
    grouped: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors:
        module, _, suffix = name.rpartition(".")
        if suffix not in TENSORS:
            module, suffix = name, "weight"
        grouped.setdefault(module, {})[suffix] = tensor
    return sorted(grouped.items(), key=lambda item: _natural(item[0]))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _module(name: str, tensors: Mapping[str, StoredTensor], plan: QuantPlan | None) -> StoredModule:
    scheme = stored_scheme(tensors)
    if scheme == "nvfp4" and plan is not None and plan.quant_of([name]) == "nvfp4_w4a16":
        scheme = "nvfp4_w4a16"  # stored alike; the config tells them apart
    weight = tensors.get("weight")
    weights = 0 if weight is None else prod(weight.shape) * (2 if scheme.startswith("nvfp4") else 1)
    ordered = {key: tensors[key] for key in TENSORS if key in tensors}
    return StoredModule(name, scheme, weights, sum(t.bytes for t in tensors.values()), ordered)


def stored_scheme(tensors: Mapping[str, StoredTensor]) -> str:
    """The scheme that dtypes and shapes of a module's tensors tell."""
    weight, scale = tensors.get("weight"), tensors.get("weight_scale")
    if weight is None:
        return next(iter(tensors.values())).dtype.lower()
    if weight.dtype not in QUANTIZED:
        return weight.dtype.lower()
    if scale is None:
        return f"{weight.dtype.lower()} without weight_scale"
    if weight.dtype == "U8":
        packed = scale.dtype == "F8_E4M3" and scale.shape == (*weight.shape[:-1], weight.shape[-1] // 8)
        return "nvfp4" if packed and "weight_scale_2" in tensors else "u8 of an unknown layout"
    if prod(scale.shape) == 1:
        return "fp8"
    return "fp8_channel" if prod(scale.shape) == weight.shape[0] else f"fp8 with scales {list(scale.shape)}"


def _totals(modules: Iterable[StoredModule]) -> dict[str, Total]:
    totals: dict[str, Total] = {}
    for module in modules:
        total = totals.setdefault(module.scheme, Total())
        total.modules += 1
        total.weights += module.weights
        total.bytes += module.bytes
        total.static += "input_scale" in module.tensors
    return totals


def _disagreements(modules: Iterable[StoredModule], plan: QuantPlan | None) -> list[str]:
    """Where the tensors are not what the config says."""
    found: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        said = "bf16" if plan is None else plan.quant_of([module.name])
        counts = module.is_quantized or (module.name in plan.layers if plan is not None else False)
        if counts and said != module.scheme:
            found.setdefault((module.scheme, said), []).append(module.name)
    return [
        f"{len(names)} modules are stored as {stored}, but the config says {said}: {names[0]}"
        + (f" to {names[-1]}" if len(names) > 1 else "")
        for (stored, said), names in found.items()
    ]
