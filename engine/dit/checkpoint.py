"""A path or hub id -> the transformers of a diffusers pipeline as stored weights, and the pipeline's other parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...quant import ModelError
from ..checkpoint import locate, read_json
from ..config import EngineConfig
from .formats import StoredTransformer, open_transformer

COMPONENTS = ("transformer", "transformer_2")  # of Wan 2.2: high noise, low noise


class DiffusionCheckpoint:
    """A folder of a diffusers pipeline, of one transformer, or a file of transformer weights.

    `transformers`: component name -> config, scheme plan and stored tensors. `folder`: where the pipeline lies.
    """

    def __init__(self, path: str | Path, config: EngineConfig) -> None:
        found = locate(path)
        self.base = None if config.base is None else locate(config.base)
        pipeline = [place for place in (found, self.base) if place is not None and _is_pipeline(place)]
        self.folder = pipeline[0] if pipeline else None
        self.transformers: dict[str, StoredTransformer] = {}
        if _is_pipeline(found):
            for name in COMPONENTS:
                if (found / name).is_dir():
                    self.transformers[name] = open_transformer(found / name, config.layout)
        else:
            self.transformers["transformer"] = open_transformer(found, config.layout, self._base_config())
        if not self.transformers:
            raise ModelError(f"{found} holds no transformer folder")

    def _base_config(self) -> Mapping[str, Any] | None:
        """The transformer's config as the base model gives it."""
        if self.base is None:
            return None
        folder = self.base / "transformer" if _is_pipeline(self.base) else self.base
        return read_json(folder / "config.json")

    def pipeline(self, **replaced: Any) -> Any:
        """diffusers' pipeline with text encoders, VAE and scheduler, the transformers `replaced`; None without one."""
        if self.folder is None:
            return None
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        absent = {
            name: None for name, entry in self.model_index.items() if isinstance(entry, list) and entry[:1] == [None]
        }
        try:
            return DiffusionPipeline.from_pretrained(self.folder, **{**absent, **replaced})
        except Exception as error:  # diffusers and transformers raise many types; all mean a broken pipeline
            raise ModelError(f"{self.folder}: diffusers cannot open the pipeline: {error}") from error

    @property
    def model_index(self) -> Mapping[str, Any]:
        return {} if self.folder is None else read_json(self.folder / "model_index.json")


def _is_pipeline(place: Path) -> bool:
    return (place / "model_index.json").is_file()
