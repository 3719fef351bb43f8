"""An adapter as PEFT saves it (adapter_config.json and adapter_model.safetensors), or as diffusers does: one file,
whose header may hold the config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...quant import ModelError, UnsupportedError
from .safetensors_files import SafetensorsSource

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_TENSORS, DIFFUSERS_CONFIG = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
REFUSED = {
    "use_dora": "DoRA scales whole rows",
    "fan_in_fan_out": "transposed weights are not adapted",
    "lora_bias": "biases are not adapted",
    "modules_to_save": "full tensors belong into update_weights",
    "rank_pattern": "one rank for all modules",
    "alpha_pattern": "one alpha for all modules",
    "layer_replication": "layers cannot be replicated",
    "trainable_token_indices": "embeddings are not adapted",
    "target_parameters": "experts are adapted one by one, by module",
    "alora_invocation_tokens": "an adapter is on for every token",
    "use_qalora": "grouped inputs are not adapted",
}
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class PeftFolder:
    """Yields an adapter's tensors; `alpha`, `rank`, `use_rslora` as its config says, None where it does not."""

    def __init__(self, path: Path) -> None:
        file = path / DIFFUSERS_TENSORS if (path / DIFFUSERS_TENSORS).is_file() else path
        if file.is_file():
            self.tensors = SafetensorsSource(file)
            config = _read_header(file.name, self.tensors.metadata())
        else:
            missing = [name for name in (CONFIG, TENSORS) if not (path / name).is_file()]
            if missing:
                raise ModelError(f"{path} is no adapter folder: {' and '.join(missing)} not found")
            self.tensors = SafetensorsSource(path / TENSORS)
            config = _read_config(path / CONFIG)
        reasons = list(_refusals(config))
        if reasons:
            raise UnsupportedError(f"{self.tensors.path.name}: its config describes more than plain LoRA", reasons)
        self.alpha, self.rank = config.get("lora_alpha"), config.get("r")
        self.use_rslora = bool(config.get("use_rslora"))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file.name} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file.name} is no JSON object")
    return config


def _read_header(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """diffusers' copy of the config: {"transformer.r": 4, ...}; empty where the file has none."""
    if DIFFUSERS_CONFIG not in metadata:
        return {}
    try:
        config = json.loads(metadata[DIFFUSERS_CONFIG])
    except ValueError as error:
        raise ModelError(f"{name}: {DIFFUSERS_CONFIG} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{name}: {DIFFUSERS_CONFIG} is no JSON object")
    components = sorted({key.partition(".")[0] for key in config})
    if len(components) > 1:
        raise UnsupportedError(f"{name} adapts {', '.join(components)}", ["give a file of one component"])
    return {key.partition(".")[2]: value for key, value in config.items()}


def _refusals(config: dict[str, Any]) -> Iterator[str]:
    kind, bias, init = config.get("peft_type", "LORA"), config.get("bias", "none"), config.get("init_lora_weights")
    if kind != "LORA":
        yield f"peft_type={kind!r}: only LORA is merged"
    if bias not in ("none", None):
        yield f"bias={bias!r}: biases are not adapted"
    if init not in PLAIN_INITS:
        yield f"init_lora_weights={init!r}: it changed the base weights, which the engine does not know"
    yield from (f"{key}={config[key]!r}: {why}" for key, why in REFUSED.items() if config.get(key))
