"""What ModelOpt writes beside the tensors: `quantization_config` of config.json, hf_quant_config.json."""

from __future__ import annotations

from collections.abc import Sequence
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
