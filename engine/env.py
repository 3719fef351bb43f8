"""Environment toggles: declared here, read once when an Engine is made. They override the config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct

from ..quant import ConfigError

PREFIX = "ROLLMILL_"


class Toggle(Struct, frozen=True):
    """One variable: its values (None: any text), what it means, and upstream's name for it."""

    name: str
    values: tuple[str, ...] | None
    meaning: str
    upstream: str | None = None


PER_TOKEN = Toggle(
    "ROLLMILL_NVFP4_PER_TOKEN_ACTIVATION",
    ("0", "1", "moe", "all"),
    "online per-token NVFP4 activations, checkpoint scales ignored: 1 or moe = routed experts, all = linears too",
    upstream="SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION",
)
LINEAR_KERNEL = Toggle("ROLLMILL_LINEAR_KERNEL", None, "linear kernel by name, or auto")
MOE_RUNNER = Toggle("ROLLMILL_MOE_RUNNER", None, "MoE runner by name, or auto")
TOGGLES = (PER_TOKEN, LINEAR_KERNEL, MOE_RUNNER)


class Toggles(Struct, frozen=True):
    """What the environment says; None: nothing."""

    per_token: Literal["moe", "all"] | None = None
    linear_kernel: str | None = None
    moe_runner: str | None = None


def read_toggles(environ: Mapping[str, str] | None = None) -> Toggles:
    """Read all toggles; `ConfigError` names an unknown variable, a bad value or a contradiction."""
    environ = os.environ if environ is None else environ
    known = [toggle.name for toggle in TOGGLES]
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ConfigError(f"unknown environment variable {', '.join(unknown)}; known: {', '.join(known)}")
    per_token = _value(PER_TOKEN, environ)
    scope: dict[str, Literal["moe", "all"]] = {"1": "moe", "moe": "moe", "all": "all"}
    return Toggles(
        per_token=None if per_token is None else scope.get(per_token),
        linear_kernel=_value(LINEAR_KERNEL, environ),
        moe_runner=_value(MOE_RUNNER, environ),
    )


def read_toggle_rows(environ: Mapping[str, str] | None = None) -> list[tuple[str, str, str, str]]:
    """(name, current value or empty, possible values, meaning) of every toggle: what `rollmill env` prints."""
    environ = os.environ if environ is None else environ
    read_toggles(environ)
    return [
        (
            toggle.name,
            _value(toggle, environ) or "",
            " | ".join(toggle.values or ("name", "auto")),
            toggle.meaning,
        )
        for toggle in TOGGLES
    ]


def cache_home() -> str:
    """Folder for files that can be made again (XDG_CACHE_HOME, or ~/.cache)."""
    return os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")


def _value(toggle: Toggle, environ: Mapping[str, str]) -> str | None:
    names = [name for name in (toggle.name, toggle.upstream) if name is not None and environ.get(name)]
    values = {environ[name].lower() for name in names}
    for name in names:
        if toggle.values is not None and environ[name].lower() not in toggle.values:
            raise ConfigError(f"{name}={environ[name]!r}; possible: {', '.join(toggle.values)}")
    if len(values) > 1:
        listed = " and ".join(f"{name}={environ[name]}" for name in names)
        raise ConfigError(f"{listed} contradict each other; set one")
    return values.pop() if values else None
