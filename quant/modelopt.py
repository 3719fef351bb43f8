"""Which module is stored how: ModelOpt's configs (config.json, hf_quant_config.json, file metadata) -> QuantPlan."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec import Struct

from .errors import ConfigError, ModelError, UnsupportedError
from .scheme import QuantName

ALGORITHMS: dict[str, QuantName] = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4_w4a16",
}
MIXED = "MIXED_PRECISION"


class QuantPlan(Struct, frozen=True):
    """Module name -> what is stored for it.

    `keep` holds patterns over whole dotted names (`*` matches anything, dots included) of modules in BF16;
    `layers` names modules one by one, `patterns` in groups (first match); `quant` holds for all others.
    """

    quant: QuantName = "bf16"
    keep: tuple[str, ...] = ()
    layers: Mapping[str, QuantName] = {}
    patterns: tuple[tuple[str, QuantName], ...] = ()
    kv_cache: str | None = None  # "fp8" or None

    def quant_of(self, modules: Sequence[str]) -> QuantName:
        """How the modules of one fused weight are stored; `ConfigError` if they are stored unequally."""
        found: dict[str, QuantName] = {module: self._quant_of(module) for module in modules}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{module}: {quant}" for module, quant in sorted(found.items())[:8])
            raise ConfigError(
                f"modules that are computed as one weight must be quantized alike, got {listed}; "
                "exclude all of them or none"
            )
        return next(iter(found.values()))

    def _quant_of(self, module: str) -> QuantName:
        if matches_any(module, self.keep):
            return "bf16"
        if module in self.layers:
            return self.layers[module]
        for pattern, quant in self.patterns:
            if matches_any(module, (pattern,)):
                return quant
        return self.quant

    def unused_patterns(self, modules: Iterable[str]) -> list[str]:
        """Patterns of `keep` that match none of `modules`."""
        names = list(modules)
        return [p for p in self.keep if not any(_compile((p,)).fullmatch(name) for name in names)]


def matches_any(module: str, patterns: Sequence[str]) -> bool:
    """Whether a whole dotted name matches one of the patterns; never a substring."""
    return bool(patterns) and _compile(tuple(patterns)).fullmatch(module) is not None


@lru_cache(maxsize=256)
def _compile(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(p).replace(r"\*", ".*") for p in patterns))


def read_quant_plan(folder: Path, config: Mapping[str, Any], metadata: Mapping[str, str]) -> QuantPlan | None:
    """The plan of a checkpoint, or None if it is not quantized.

    Order: `config["quantization_config"]` (flat or nested), hf_quant_config.json, safetensors header metadata.
    """
    if config.get("quantization_config"):
        return parse_quant_config(config["quantization_config"], "config.json:quantization_config")
    path = folder / "hf_quant_config.json"
    if path.is_file():
        return parse_quant_config(_load_json(path.read_bytes(), path.name), path.name)
    for key in ("quantization_config", "_quantization_metadata"):
        if key in metadata:
            where = f"safetensors metadata {key}"
            return parse_quant_config(_load_json(metadata[key], where), where)
    return None


def parse_quant_config(raw: Any, where: str) -> QuantPlan:
    """ModelOpt's config, flat (`quant_algo` at the top) or nested under `quantization`."""
    raw = _mapping(raw, where)
    if isinstance(raw.get("quantization"), Mapping):
        raw = raw["quantization"]
    if "quant_algo" not in raw and "layers" in raw:
        entries = {name: _mapping(entry, where) for name, entry in _mapping(raw["layers"], where).items()}
        layers: dict[str, QuantName] = {
            name: _algorithm(str(entry.get("format")).upper(), where) for name, entry in entries.items()
        }
        return QuantPlan(layers=layers)
    method, algorithm = raw.get("quant_method", "modelopt"), raw.get("quant_algo")
    if method != "modelopt" or algorithm is None:
        raise UnsupportedError(
            f"{where}: quant_method {method!r}, quant_algo {algorithm!r} is not ModelOpt's",
            [f"known algorithms: {', '.join([*ALGORITHMS, MIXED])}", "or open a BF16 checkpoint with quant=..."],
        )
    _check_group_sizes(raw, where)
    if algorithm == MIXED:
        listed = _mapping(raw.get("quantized_layers", {}), where)
        listed_layers: dict[str, QuantName] = {
            name: _layer_algorithm(name, entry, where) for name, entry in listed.items()
        }
        return QuantPlan(keep=_keep(raw, where), layers=listed_layers, kv_cache=_kv_cache(raw, where))
    return QuantPlan(_algorithm(algorithm, where), _keep(raw, where), kv_cache=_kv_cache(raw, where))


def _keep(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The exclude list under any of its names."""
    names = raw.get("ignore") or raw.get("exclude_modules") or raw.get("modules_to_not_convert") or ()
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{where}: the modules to exclude are no list of names: {names!r:.80}")
    return tuple(names)


def _layer_algorithm(name: str, entry: Any, where: str) -> QuantName:
    entry = _mapping(entry, f"{where}: {name}")
    _check_group_sizes(entry, f"{where}: {name}")
    return _algorithm(entry.get("quant_algo"), f"{where}: {name}")


def _algorithm(name: str | None, where: str) -> QuantName:
    if name not in ALGORITHMS:
        raise UnsupportedError(f"{where}: quant_algo {name!r}", [f"known: {', '.join([*ALGORITHMS, MIXED])}"])
    return ALGORITHMS[name]


def _check_group_sizes(raw: Mapping[str, Any], where: str) -> None:
    groups = _mapping(raw.get("config_groups") or {}, where).values()
    holders = [
        raw,
        *(g.get(part) for g in groups if isinstance(g, Mapping) for part in ("weights", "input_activations")),
    ]
    for size in (holder.get("group_size") for holder in holders if isinstance(holder, Mapping)):
        if size not in (None, 16):
            raise UnsupportedError(f"{where}: group_size {size}", ["NVFP4 has groups of 16"])


def _kv_cache(raw: Mapping[str, Any], where: str) -> str | None:
    scheme, algorithm = _mapping(raw.get("kv_cache_scheme") or {}, where), raw.get("kv_cache_quant_algo")
    if not scheme and algorithm is None:
        return None
    is_fp8 = not scheme or (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
    if is_fp8 and algorithm in (None, "FP8"):
        return "fp8"
    raise UnsupportedError(f"{where}: KV cache {algorithm or scheme}", ["known: FP8, or none"])


def _mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise ModelError(f"{where}: expected a JSON object, got {raw!r:.80}")
    return raw


def _load_json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ModelError(f"{where} is no valid JSON: {error}") from error
