"""Which scheme every layer gets: the checkpoint's plan, the config and the toggles, resolved once at open."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Literal

from ..quant import (
    BF16,
    Activation,
    ConfigError,
    QuantName,
    QuantPlan,
    Scheme,
    UnsupportedError,
    make_scheme,
)
from .config import DEFAULT_KEEP, EngineConfig, QuantSpec
from .env import Toggles

log = logging.getLogger("rollmill")
Kind = Literal["linear", "experts"]


class SchemeResolver:
    """Module names -> scheme. Remembers what was decided against expectation, for the load report."""

    def __init__(
        self,
        config: EngineConfig,
        stored: QuantPlan | None,
        tensor_names: Collection[str],
        toggles: Toggles,
        default_keep: Sequence[str] = DEFAULT_KEEP,
    ) -> None:
        self.config, self.toggles = config, toggles
        self.plan = merge_plans(config, stored, default_keep)
        self._with_input_scale = {n.removesuffix(".input_scale") for n in tensor_names if n.endswith(".input_scale")}
        self._modules: list[str] = []
        self._without_scale: list[str] = []
        self._ignored_scale: list[str] = []

    def scheme(self, modules: Sequence[str], kind: Kind = "linear") -> Scheme:
        """The scheme of one fused weight (or of all experts of a layer), given its checkpoint module names."""
        self._modules += modules
        quant = self.plan.quant_of(modules)
        if quant == "bf16":
            return BF16
        return make_scheme(quant, self._activation(quant, modules, kind))

    def _activation(self, quant: QuantName, modules: Sequence[str], kind: Kind) -> Activation:
        if quant == "nvfp4_w4a16":
            return "none"
        missing = [module for module in modules if module not in self._with_input_scale]
        wanted = "per_token" if quant == "nvfp4" and self._forced(kind) else self.config.activation
        if wanted == "static" or wanted is None:
            if not missing:
                return "static"
            self._without_scale += missing
            return "static" if wanted == "static" else "per_token"
        self._ignored_scale += [module for module in modules if module in self._with_input_scale]
        return wanted

    def _forced(self, kind: Kind) -> bool:
        return self.toggles.per_token == "all" or (self.toggles.per_token == "moe" and kind == "experts")

    def finish(self) -> list[str]:
        """Check the whole; returns warnings. `UnsupportedError` names layers that lack a scale they must have."""
        if self.config.activation == "static" and self._without_scale:
            raise UnsupportedError(
                "activation='static' needs an input_scale a layer, and the checkpoint has none for",
                [
                    _listed(self._without_scale),
                    "use activation=None or 'per_token': no calibration is needed",
                ],
            )
        warnings = []
        if self._without_scale and self._with_input_scale:
            warnings.append(f"without input_scale, so per token: {_listed(self._without_scale)}")
        if self._ignored_scale:
            warnings.append(f"static activation scales of the checkpoint are ignored: {_listed(self._ignored_scale)}")
        unused = [p for p in self.plan.unused_patterns(self._modules) if p in (self.config.keep or ())]
        if unused:
            warnings.append(f"keep patterns that match no module: {', '.join(unused)}")
        for warning in warnings:
            log.warning("%s", warning)
        return warnings


def merge_plans(
    config: EngineConfig, stored: QuantPlan | None, default_keep: Sequence[str] = DEFAULT_KEEP
) -> QuantPlan:
    """What the engine computes: the config's wish where there is one, else what the checkpoint stores."""
    wished = config.keep if config.keep is not None else default_keep if stored is None else ()
    keep = tuple(wished) + (stored.keep if stored is not None else ())
    kv_cache = stored.kv_cache if stored is not None else None
    if config.quant is None:
        if stored is None:
            return QuantPlan()
        return QuantPlan(stored.quant, keep, stored.layers, stored.patterns, kv_cache)
    if stored is not None and config.quant != "bf16":
        _check_same_format(config.quant, stored)
    if isinstance(config.quant, QuantSpec):
        return QuantPlan(config.quant.quant, keep, patterns=tuple(config.quant.layers.items()), kv_cache=kv_cache)
    return QuantPlan(config.quant, keep, kv_cache=kv_cache)


def _check_same_format(wanted: QuantName | QuantSpec, stored: QuantPlan) -> None:
    family = {"nvfp4_w4a16": "nvfp4"}  # one stored form
    if isinstance(wanted, QuantSpec) or stored.layers:
        raise ConfigError(
            "a checkpoint that is quantized layer by layer, or a QuantSpec over a quantized checkpoint, cannot be "
            "requantized; use quant=None or 'bf16', or give a BF16 checkpoint"
        )
    if family.get(wanted, wanted) != family.get(stored.quant, stored.quant):
        raise UnsupportedError(
            f"quant={wanted!r}, but the checkpoint stores {stored.quant}",
            [
                "requantizing quantized weights loses twice: give the BF16 checkpoint",
                "or use quant=None or 'bf16'",
            ],
        )


def _listed(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
