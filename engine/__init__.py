"""What users start: `Engine`, its configs, results and errors."""

from ..quant import QuantPlan
from ..weight_sync import UpdateReport, WeightSession, WeightSource
from .config import EngineConfig, QuantSpec, SamplingParams
from .engine import Engine
from .errors import (
    AsleepError,
    ClosedError,
    ConfigError,
    CoverageError,
    ModelError,
    NonFiniteError,
    PausedError,
    PoisonedError,
    RequestError,
    RollmillError,
    SessionBusyError,
    SessionClosedError,
    ShapeError,
    StagingMemoryError,
    StaleVersionError,
    TransportError,
    UnsupportedError,
)
from .export import ExportReport, quantize_checkpoint
from .inventory import Inventory, inspect_checkpoint
from .types import Completion, StreamChunk, TopLogprobs, VersionSpan

__all__ = [
    "AsleepError",
    "ClosedError",
    "Completion",
    "ConfigError",
    "CoverageError",
    "Engine",
    "EngineConfig",
    "ExportReport",
    "Inventory",
    "ModelError",
    "NonFiniteError",
    "PausedError",
    "PoisonedError",
    "QuantPlan",
    "QuantSpec",
    "RequestError",
    "RollmillError",
    "SamplingParams",
    "SessionBusyError",
    "SessionClosedError",
    "ShapeError",
    "StagingMemoryError",
    "StaleVersionError",
    "StreamChunk",
    "TopLogprobs",
    "TransportError",
    "UnsupportedError",
    "UpdateReport",
    "VersionSpan",
    "WeightSession",
    "WeightSource",
    "inspect_checkpoint",
    "quantize_checkpoint",
]
