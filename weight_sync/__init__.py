"""From anywhere into slots: sources, the plan, the session, digests."""

from .errors import (
    AsleepError,
    CoverageError,
    NonFiniteError,
    PoisonedError,
    SessionBusyError,
    SessionClosedError,
    ShapeError,
    StagingMemoryError,
    StaleVersionError,
    TransportError,
)
from .master import MasterPlace
from .memory import free_bytes, staging_bytes, staging_shortage
from .messages import UpdateReport
from .plan import SyncPlan, Target
from .policy import INITIAL_VERSION, Policy
from .session import SwapMode, WeightSession
from .source import Source, WeightSource, open_source
from .sources.flat_bucket import FlatBucketSource, FlatEntry
from .sources.safetensors_files import SafetensorsSource
from .sources.tensors import TensorSource

__all__ = [
    "INITIAL_VERSION",
    "AsleepError",
    "CoverageError",
    "FlatBucketSource",
    "FlatEntry",
    "MasterPlace",
    "NonFiniteError",
    "Policy",
    "PoisonedError",
    "SafetensorsSource",
    "SessionBusyError",
    "SessionClosedError",
    "ShapeError",
    "Source",
    "StagingMemoryError",
    "StaleVersionError",
    "SwapMode",
    "SyncPlan",
    "Target",
    "TensorSource",
    "TransportError",
    "UpdateReport",
    "WeightSession",
    "WeightSource",
    "free_bytes",
    "open_source",
    "staging_bytes",
    "staging_shortage",
]
