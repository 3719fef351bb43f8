"""The errors of rollmill: one root, so that a caller can catch everything that is ours."""

from __future__ import annotations

from collections.abc import Sequence


class RollmillError(Exception):
    """Root of every error that rollmill raises on purpose."""


class ConfigError(RollmillError):
    """A setting that is unknown, out of range, or contradicts another."""


class ModelError(RollmillError):
    """A path that is no model, or a checkpoint that is torn or inconsistent."""


class UnsupportedError(RollmillError):
    """A choice that cannot be honoured; `reasons` lists every reason."""

    def __init__(self, what: str, reasons: Sequence[str] = ()) -> None:
        self.reasons = tuple(reasons)
        super().__init__("\n  - ".join([what, *self.reasons]))
