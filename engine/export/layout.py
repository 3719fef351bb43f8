"""What ModelOpt writes beside the tensors: `quantization_config` of config.json, hf_quant_config.json."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from ...quant.scheme import GROUP_SIZE

QuantFormat = Literal["fp8", "nvfp4"]
ALGORITHMS: dict[QuantFormat, str] = {"fp8": "FP8", "nvfp4": "NVFP4"}
BITS: dict[QuantFormat, int] = {"fp8": 8, "nvfp4": 4}
PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # whose layout this is: readers look for the name


def hf_quant_config(quant: QuantFormat, kept: Sequence[str]) -> dict[str, Any]:
    """hf_quant_config.json."""
    group = {"group_size": GROUP_SIZE} if quant == "nvfp4" else {}
    quantization = {"quant_algo": ALGORITHMS[quant], "kv_cache_quant_algo": None, **group, "exclude_modules": [*kept]}
    return {"producer": PRODUCER, "quantization": quantization}


def quantization_config(quant: QuantFormat, kept: Sequence[str], *, static: bool) -> dict[str, Any]:
    """`quantization_config` of config.json; activations are `dynamic` where no scale was calibrated."""
    group = {"group_size": GROUP_SIZE} if quant == "nvfp4" else {}
    weights = {"dynamic": False, "num_bits": BITS[quant], "type": "float", **group}
    return {
        "config_groups": {
            "group_0": {
                "input_activations": {**weights, "dynamic": not static},
                "weights": weights,
                "targets": ["Linear"],
            }
        },
        "ignore": [*kept],
        "quant_algo": ALGORITHMS[quant],
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


def summarize_modules(kept: Collection[str], quantized: Collection[str]) -> list[str]:
    """The kept modules as ModelOpt lists them: `prefix*` for the shortest dotted prefix that no quantized module
    begins with, whole names of modules at the top."""
    listed: set[str] = set()
    for module in kept:
        listed |= next(patterns for patterns in _patterns(module) if not _matches(patterns, quantized))
    return sorted(listed)


def _patterns(module: str) -> Iterator[set[str]]:
    """From the widest to the module itself: a prefix with whatever follows, or with its own sub-tree only."""
    parts = module.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length])
        yield {f"{prefix}*"}
        yield {prefix, f"{prefix}.*"}
    yield {module}


def _matches(patterns: Collection[str], modules: Collection[str]) -> bool:
    starts = tuple(pattern.removesuffix("*") for pattern in patterns if pattern.endswith("*"))
    return any(module.startswith(starts) or module in patterns for module in modules)
