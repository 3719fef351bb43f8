"""A path or hub id -> folder, config, quantization plan, tensor names, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..quant import ModelError, QuantPlan, read_quant_plan
from ..weight_sync import SafetensorsSource
from .llm.decoder_config import DecoderConfig, Family

DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Checkpoint:
    """What a model folder says before any weight is read."""

    def __init__(self, path: str | Path) -> None:
        self.folder = find_folder(path)
        self.raw_config = read_json(self.folder / "config.json")
        self.source = SafetensorsSource(self.folder)
        self.tensor_names = self.source.names()

    @property
    def architectures(self) -> list[str]:
        names = self.raw_config.get("architectures") or []
        if not isinstance(names, list):
            raise ModelError(f"config.json: architectures is no list: {names!r:.80}")
        return [str(name) for name in names]

    def hf_config(self) -> PreTrainedConfig:
        """The config as transformers reads it."""
        try:
            return AutoConfig.from_pretrained(self.folder)
        except Exception as error:  # transformers and its checkers raise many types; all mean a broken config
            raise ModelError(f"config.json: transformers cannot read it: {error}") from error

    def read_config(self, family: Family) -> DecoderConfig:
        """What the decoder needs to know; `ModelError` if config.json does not describe this family."""
        hf = self.hf_config()
        try:
            return family.read_config(hf)
        except (AttributeError, KeyError, TypeError) as error:
            raise ModelError(f"config.json does not describe a {family.ARCHITECTURES[0]}: {error}") from error

    def quant_plan(self) -> QuantPlan | None:
        return read_quant_plan(self.folder, self.raw_config, self.source.metadata())

    def eos_token_ids(self) -> frozenset[int]:
        """End-of-sequence tokens of generation_config.json, else of config.json."""
        path = self.folder / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        eos = generation.get("eos_token_id", self.raw_config.get("eos_token_id"))
        return frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The folder's tokenizer, or None if it has none."""
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            return None
        return AutoTokenizer.from_pretrained(self.folder)


def find_folder(path: str | Path) -> Path:
    """`locate`, for a folder with a config.json."""
    folder = locate(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; give a folder in Hugging Face layout")
    return folder


def locate(path: str | Path) -> Path:
    """A folder or file as it is; `organization/name` through the Hugging Face hub or its cache."""
    if not isinstance(path, str | Path):
        raise ModelError(f"a model is the path of a folder or a hub id, got {path!r:.80}")
    found = Path(path)
    if found.is_dir() or found.suffix == ".safetensors" and found.is_file():
        return found
    if found.is_absolute() or str(path).count("/") != 1 or found.exists():
        raise ModelError(f"{path} is no folder; give a folder in Hugging Face layout, or a hub id organization/name")
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # the hub client raises many types; all mean that there is no model
        raise ModelError(f"{path} is no folder, and the hub gave no such model ({error.__class__.__name__})") from error


def is_diffusers(path: str | Path) -> bool:
    """Whether `path` holds a diffusion pipeline, a diffusers transformer, or a file of diffusion weights."""
    found = locate(path)
    if found.is_file() or any((found / name).is_file() for name in ("model_index.json", "transformer/config.json")):
        return True
    config = found / "config.json"
    return "_class_name" in read_json(config) if config.is_file() else any(found.glob("*.safetensors"))


def read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or no UTF-8
        raise ModelError(f"{path.name} is no valid JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise ModelError(f"{path.name} is no JSON object")
    return found
