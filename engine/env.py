"""Environment toggles: declared here, read once when an Engine is made. They override the config."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Literal

from msgspec import Struct

from ..quant import ConfigError

PREFIX = "ROLLMILL_"


class Toggle(Struct, frozen=True):
    """One variable: its values (None: any text), what it means, upstream's name for it and for its values."""

    name: str
    values: tuple[str, ...] | None
    meaning: str
    upstream: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()

    def read(self, text: str) -> str:
        """The value in our words."""
        return dict(self.aliases).get(text.lower(), text.lower())


PER_TOKEN = Toggle(
    "ROLLMILL_NVFP4_PER_TOKEN_ACTIVATION",
    ("0", "1", "moe", "all"),
    "online per-token NVFP4 activations, checkpoint scales ignored: 1 or moe = routed experts, all = linears too",
    upstream="SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION",
)
LINEAR_KERNEL = Toggle("ROLLMILL_LINEAR_KERNEL", None, "linear kernel by name, or auto")
MOE_RUNNER = Toggle("ROLLMILL_MOE_RUNNER", None, "MoE runner by name, or auto")
FP4_GEMM_BACKEND = Toggle(
    "ROLLMILL_FP4_GEMM_BACKEND",
    ("trtllm", "cute-dsl", "cutlass", "cudnn", "auto"),
    "FlashInfer's FP4 GEMM for NVFP4 linears; auto: FlashInfer's own choice. Unset: by GPU",
    upstream="SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND",
    aliases=(
        ("flashinfer_trtllm", "trtllm"),
        ("flashinfer_cutedsl", "cute-dsl"),
        ("flashinfer_cutlass", "cutlass"),
        ("flashinfer_cudnn", "cudnn"),
    ),
)
TOGGLES = (PER_TOKEN, LINEAR_KERNEL, MOE_RUNNER, FP4_GEMM_BACKEND)

# What FlashInfer itself reads. Its quantizers divide exactly, as our reference does, only when asked to; its experts'
# second product takes 4-over-6 scales from the environment, whatever the call says.
EXACT_DIVISION = "FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH"
FOUR_OVER_SIX = "FLASHINFER_NVFP4_4OVER6"


class Toggles(Struct, frozen=True):
    """What the environment says; None: nothing."""

    per_token: Literal["moe", "all"] | None = None
    linear_kernel: str | None = None
    moe_runner: str | None = None
    fp4_gemm_backend: str | None = None


def read_toggles(environ: Mapping[str, str] | None = None) -> Toggles:
    """Read all toggles; `ConfigError` names an unknown variable, a bad value or a contradiction."""
    environ = os.environ if environ is None else environ
    known = [toggle.name for toggle in TOGGLES]
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ConfigError(f"unknown environment variable {', '.join(unknown)}; known: {', '.join(known)}")
    per_token = _value(PER_TOKEN, environ)
    scope: dict[str, Literal["moe", "all"]] = {"1": "moe", "moe": "moe", "all": "all"}
    if _value(FP4_GEMM_BACKEND, environ) and _value(LINEAR_KERNEL, environ):
        raise ConfigError(f"{FP4_GEMM_BACKEND.name} and {LINEAR_KERNEL.name} both name kernels for linears; set one")
    return Toggles(
        per_token=None if per_token is None else scope.get(per_token),
        linear_kernel=_value(LINEAR_KERNEL, environ),
        moe_runner=_value(MOE_RUNNER, environ),
        fp4_gemm_backend=_value(FP4_GEMM_BACKEND, environ),
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


def pin_nvfp4_recipe(environ: MutableMapping[str, str] | None = None) -> None:
    """Have FlashInfer quantize as our reference does; `ConfigError` where the environment asks for another recipe."""
    environ = os.environ if environ is None else environ
    if environ.get(EXACT_DIVISION, "1") != "1":
        raise ConfigError(f"{EXACT_DIVISION}={environ[EXACT_DIVISION]}: rollmill divides exactly; unset it or set 1")
    if environ.get(FOUR_OVER_SIX, "0") not in ("", "0"):
        raise ConfigError(f"{FOUR_OVER_SIX}={environ[FOUR_OVER_SIX]}: rollmill's NVFP4 has no 4-over-6; unset it")
    environ[EXACT_DIVISION] = "1"


def cache_home() -> str:
    """Folder for files that can be made again (XDG_CACHE_HOME, or ~/.cache)."""
    return os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")


def _value(toggle: Toggle, environ: Mapping[str, str]) -> str | None:
    names = [name for name in (toggle.name, toggle.upstream) if name is not None and environ.get(name)]
    values = {toggle.read(environ[name]) for name in names}
    for name in names:
        if toggle.values is not None and toggle.read(environ[name]) not in toggle.values:
            possible = [*toggle.values, *(alias for alias, _ in toggle.aliases)]
            raise ConfigError(f"{name}={environ[name]!r}; possible: {', '.join(possible)}")
    if len(values) > 1:
        listed = " and ".join(f"{name}={environ[name]}" for name in names)
        raise ConfigError(f"{listed} contradict each other; set one")
    return values.pop() if values else None
