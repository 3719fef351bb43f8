"""What users start: `Engine`, its configs, results and errors."""

from ..quant import QuantPlan
from ..weight_sync import UpdateReport, WeightSession, WeightSource
from .config import EngineConfig, NVFP4Layout, QuantSpec, SamplingParams
from .dit.engine import DiffusionEngine
from .dit.families import Embeds
from .dit.params import ODE, DanceSDE, DiffusionParams, FlowCPS, FlowSDE, ProgressiveWindow, RandomWindow
from .dit.sample import DiffusionSample, Exploration
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
from .export import ExportReport, quantize_checkpoint, quantize_diffusion
from .inventory import Inventory, inspect_checkpoint
from .llm.engine import LanguageEngine
from .types import Completion, StreamChunk, TopLogprobs, VersionSpan

__all__ = [
    "ODE",
    "AsleepError",
    "ClosedError",
    "Completion",
    "ConfigError",
    "CoverageError",
    "DanceSDE",
    "DiffusionEngine",
    "DiffusionParams",
    "DiffusionSample",
    "Embeds",
    "Engine",
    "EngineConfig",
    "Exploration",
    "ExportReport",
    "FlowCPS",
    "FlowSDE",
    "Inventory",
    "LanguageEngine",
    "ModelError",
    "NVFP4Layout",
    "NonFiniteError",
    "PausedError",
    "PoisonedError",
    "ProgressiveWindow",
    "QuantPlan",
    "QuantSpec",
    "RandomWindow",
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
    "quantize_diffusion",
]
