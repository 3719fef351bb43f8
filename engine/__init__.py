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
from .types import Chunk, Completion, TopLogprobs, VersionSpan

__all__ = [
    "AsleepError",
    "Chunk",
    "ClosedError",
    "Completion",
    "ConfigError",
    "CoverageError",
    "Engine",
    "EngineConfig",
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
    "TopLogprobs",
    "TransportError",
    "UnsupportedError",
    "UpdateReport",
    "VersionSpan",
    "WeightSession",
    "WeightSource",
]
