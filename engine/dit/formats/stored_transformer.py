"""`StoredTransformer`: one transformer's weights in canonical form, whatever file they came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from ....quant import ModelError, QuantPlan, read_quant_plan
from ....weight_sync import SafetensorsSource, WeightSource
from ...checkpoint import read_json
from ...config import NVFP4Layout


class StoredTransformer(Struct, frozen=True):
    """`config`: diffusers' config.json; `source`: stored tensors in diffusers' names, low nibble = even k, linear
    scales; `tensor_names`: theirs; `plan`: which module is stored how, None if all are BF16."""

    config: Mapping[str, Any]
    source: WeightSource
    tensor_names: frozenset[str]
    plan: QuantPlan | None


def open_transformer(
    place: Path, layout: NVFP4Layout | None = None, config: Mapping[str, Any] | None = None
) -> StoredTransformer:
    """Open a transformer folder of diffusers, or a file."""
    source = SafetensorsSource(place)
    if config is None:
        if not (place / "config.json").is_file():
            raise ModelError(f"{place} holds no config.json")
        config = read_json(place / "config.json")
    return StoredTransformer(
        config, source, frozenset(source.names()), read_quant_plan(place, config, source.metadata())
    )
