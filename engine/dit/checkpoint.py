"""A path or hub id -> the transformers of a diffusers pipeline as stored weights, and the pipeline's other parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...quant import ConfigError, ModelError
from ...weight_sync import Source
from ..checkpoint import locate, read_json
from ..config import EngineConfig, NVFP4Layout
from .formats import StoredTransformer, config_beside, open_transformer

COMPONENTS = ("transformer", "transformer_2")  # of Wan 2.2: high noise, low noise


class DiffusionCheckpoint:
    """A folder of a diffusers pipeline (or of its transformers alone), of one transformer, or a file of transformer
    weights.

    `transformers`: component name -> config, scheme plan and stored tensors; what a file or a bare transformer lacks,
    a second transformer too, comes from `EngineConfig(base=...)`. `folder`: where the pipeline lies.
    """

    def __init__(self, path: str | Path, config: EngineConfig) -> None:
        found = locate(path)
        self.base = None if config.base is None else locate(config.base)
        pipeline = [place for place in (found, self.base) if place is not None and is_pipeline(place)]
        self.folder = pipeline[0] if pipeline else None
        self.transformers: dict[str, StoredTransformer]
        parts = parts_of(found)
        if parts:
            self.transformers = {name: open_transformer(place, config.layout) for name, place in parts.items()}
        else:
            self.transformers = {"transformer": open_transformer(found, config.layout, self._base_config())}
            others = {} if self.base is None else parts_of(self.base)
            self.transformers |= {name: open_transformer(others[name]) for name in others.keys() - {"transformer"}}

    def _base_config(self) -> Mapping[str, Any] | None:
        """The transformer's config as the base model gives it."""
        if self.base is None:
            return None
        found = config_beside(parts_of(self.base).get("transformer", self.base))
        if found is None:
            raise ModelError(f"base={str(self.base)!r} holds no config.json of a diffusers transformer")
        return found

    def open_weights(self, path: str | Path, component: str, layout: NVFP4Layout | None) -> Source:
        """New weights of this model from a file or folder, as stored tensors; `component` "": of all of them.

        The config is that of the model, where none lies beside the weights. `ConfigError`: a place that does not hold
        every transformer of this model does not tell which one it is for.
        """
        place = locate(path)
        parts = parts_of(place)
        if not component and not parts.keys() >= self.transformers.keys():
            raise ConfigError(
                f"{place} holds one transformer, and there are {len(self.transformers)} modules: say module=...; "
                f"possible: {', '.join(self.transformers)}"
            )
        parts = parts or {component: place}
        wanted = [component] if component else list(self.transformers)
        if not set(wanted) <= parts.keys():
            raise ModelError(f"{place} holds {', '.join(parts)}, but no {component}")
        opened = {n: open_transformer(parts[n], layout, self.transformers[n].config) for n in wanted}
        return ((f"{name}.{key}", value) for name, one in opened.items() for key, value in one.source)

    def pipeline(self, **replaced: Any) -> Any:
        """diffusers' pipeline with text encoders, VAE and scheduler, the transformers `replaced`; None without one."""
        if self.folder is None:
            return None
        import diffusers
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        # The base class overlooks optional components (Wan's transformers): it would load them from the folder.
        kind: Any = getattr(diffusers, str(self.model_index.get("_class_name")), DiffusionPipeline)
        absent = {
            name: None for name, entry in self.model_index.items() if isinstance(entry, list) and entry[:1] == [None]
        }
        try:
            return kind.from_pretrained(self.folder, **{**absent, **replaced})
        except Exception as error:  # diffusers and transformers raise many types; all mean a broken pipeline
            raise ModelError(f"{self.folder}: diffusers cannot open the pipeline: {error}") from error

    @property
    def model_index(self) -> Mapping[str, Any]:
        return {} if self.folder is None else read_json(self.folder / "model_index.json")


def parts_of(place: Path) -> dict[str, Path]:
    """The transformer folders of a pipeline, by component; none where `place` is a transformer itself."""
    found = {name: place / name for name in COMPONENTS if (place / name).is_dir()}
    if "transformer" not in found and is_pipeline(place):
        raise ModelError(f"{place} is a pipeline without a transformer folder")
    return found


def is_pipeline(place: Path) -> bool:
    return (place / "model_index.json").is_file()
