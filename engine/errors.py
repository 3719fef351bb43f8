"""Every error that an engine raises on purpose; all derive from `RollmillError`."""

from ..quant import ConfigError, ModelError, RollmillError, UnsupportedError
from ..weight_sync import (
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


class RequestError(RollmillError):
    """A prompt or sampling parameter that cannot be served."""


class ClosedError(RollmillError):
    """The engine has been closed."""


__all__ = [
    "AsleepError",
    "ClosedError",
    "ConfigError",
    "CoverageError",
    "ModelError",
    "NonFiniteError",
    "PoisonedError",
    "RequestError",
    "RollmillError",
    "SessionBusyError",
    "SessionClosedError",
    "ShapeError",
    "StagingMemoryError",
    "StaleVersionError",
    "TransportError",
    "UnsupportedError",
]
