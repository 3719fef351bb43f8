"""Which kernel computes which layer on which GPU, and why no other: of a checkpoint's layers, or at usual shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from msgspec import Struct

from ..moe import MoeConfig, RoutedExperts, judge_runners, select_runner
from ..quant import (
    FP8,
    Capability,
    Plain,
    Scheme,
    UnsupportedError,
    WeightShape,
    judge_kernels,
    make_scheme,
    select_kernel,
)
from ..quant.flashinfer_api.guard import TacticGuard
from ..quant.siblings import SplitPacker
from .checkpoint import Checkpoint, is_diffusers
from .config import EngineConfig
from .dit.checkpoint import DiffusionCheckpoint
from .dit.families import default_keep
from .dit.transformer import PrecisionSwitch, Transformer
from .env import read_toggles
from .kernel_names import KernelNames, read_kernel_names
from .llm.decoder import Decoder
from .llm.layers.sparse_mlp import SparseMLP
from .llm.models import find_family
from .llm.parts import Parts
from .schemes import SchemeResolver

USUAL_SHAPE = WeightShape((4096,), 4096)
USUAL_EXPERTS = MoeConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
USUAL_SCHEMES = [
    make_scheme(quant, activation)
    for quant in ("fp8", "fp8_channel", "nvfp4")
    for activation in ("static", "per_token")
] + [make_scheme("nvfp4_w4a16", "none")]
CHECKED_TOKENS = (1, 64, 1024)

Product = tuple[Scheme, WeightShape | MoeConfig]


class KernelRow(Struct, frozen=True):
    """One kernel's verdict on the layers of one scheme and shape: "taken", "can", or why it cannot.

    `shape`: [rows, cols] of a linear, [experts, hidden_size, intermediate_size] of routed experts.
    `self_check`: what the taken kernel's tactics did on this very GPU; empty elsewhere.
    """

    layers: int
    scheme: str
    activation: str
    shape: tuple[int, ...]
    kernel: str
    verdict: str
    self_check: tuple[str, ...] = ()

    @property
    def is_taken(self) -> bool:
        return self.verdict == "taken"


def kernel_table(path: str | Path | None, config: EngineConfig, capability: Capability) -> list[KernelRow]:
    """All kernels for all quantized layers of a model in BF16 arithmetic, as an engine with `config` would choose on
    this device; without a path for every scheme at usual shapes. `UnsupportedError` where nothing can."""
    names = read_kernel_names(config, read_toggles())
    products = Counter(_usual() if path is None else _products_of(path, config))
    rows = []
    for (scheme, shape), layers in products.items():
        rows += _rows(scheme, shape, layers, capability, names)
    return rows


def _rows(
    scheme: Scheme, shape: WeightShape | MoeConfig, layers: int, capability: Capability, names: KernelNames
) -> Iterator[KernelRow]:
    dtype, invariant = torch.bfloat16, names.batch_invariant
    if isinstance(shape, MoeConfig):
        asked = {"linear_kernel": names.linear, "batch_invariant": invariant}
        taken = select_runner(shape, scheme, capability, names.moe, dtype, **asked)
        judged, dims = judge_runners(shape, scheme, capability, dtype, batch_invariant=invariant), _dims(shape)
        make = lambda: taken(shape, scheme, capability, dtype, names.linear)  # noqa: E731
    else:
        taken = select_kernel(scheme, shape, capability, dtype, names.of_linear(scheme), batch_invariant=invariant)
        judged, dims = judge_kernels(scheme, shape, capability, dtype, batch_invariant=invariant), shape.matrix
        make = lambda: taken(scheme, shape, dtype, capability)  # noqa: E731
    for kernel, reason in judged:
        verdict = "taken" if kernel is taken else reason or "can"
        checked = _self_check(make(), capability) if kernel is taken else ()
        yield KernelRow(layers, _quant_name(scheme), scheme.activation, dims, kernel.name, verdict, checked)


def _quant_name(scheme: Scheme) -> str:
    return "fp8_channel" if isinstance(scheme, FP8) and scheme.per_channel else scheme.name


def _dims(config: MoeConfig) -> tuple[int, ...]:
    return config.num_experts, config.hidden_size, config.intermediate_size


def _self_check(kernel: object, capability: Capability) -> tuple[str, ...]:
    """Run the kernel's guard where its GPU is here."""
    guard = getattr(kernel, "guard", None)
    if not isinstance(guard, TacticGuard) or capability.device.type == "meta":
        return ()
    lines: list[str] = []
    for tokens in CHECKED_TOKENS:
        try:
            (served,) = guard.prepare(tokens)
            lines.append(f"up to {served.tokens} tokens: {served.tactic}")
            lines += [f"  refused {refused}" for refused in served.refused]
        except UnsupportedError as error:
            lines += [f"up to {tokens} tokens: REFUSED", *(f"  {reason}" for reason in error.reasons)]
    return tuple(lines)


def _usual() -> Iterator[Product]:
    for scheme in USUAL_SCHEMES:
        yield scheme, USUAL_SHAPE
        yield scheme, USUAL_EXPERTS


def _products_of(path: str | Path, config: EngineConfig) -> Iterator[Product]:
    """(scheme, shape) of every quantized layer, from layers without memory."""
    nowhere = Capability(torch.device("meta"), None, ())
    if is_diffusers(path):
        yield from _products_of_diffusion(path, config, nowhere)
        return
    checkpoint = Checkpoint(path)
    resolver = SchemeResolver(config, checkpoint.quant_plan(), checkpoint.tensor_names, read_toggles())
    parts = Parts(resolver, nowhere, torch.float32, KernelNames("reference", "reference"))
    stored = None if resolver.plan.kv_cache is None else "stored"
    model = Decoder(checkpoint.read_config(find_family(checkpoint.architectures)), parts, stored)
    experts = [layer.mlp.experts for layer in model.layers if isinstance(layer.mlp, SparseMLP)]
    of_experts = {slot for layer in experts for slot in layer.slots}
    for slot in model.slots:
        if not isinstance(slot.scheme, Plain) and slot not in of_experts:
            yield slot.scheme, slot.shape
    for layer in experts:
        yield from _product_of_experts(layer)


def _product_of_experts(layer: RoutedExperts) -> Iterator[Product]:
    if not isinstance(layer.w13.scheme, Plain):
        yield layer.w13.scheme, layer.config


def _products_of_diffusion(path: str | Path, config: EngineConfig, nowhere: Capability) -> Iterator[Product]:
    for name, stored in DiffusionCheckpoint(path, config).transformers.items():
        keep = default_keep(str(stored.config.get("_class_name")))
        resolver = SchemeResolver(config, stored.plan, stored.tensor_names, read_toggles(), keep)
        names = KernelNames("reference")
        switch = PrecisionSwitch()
        model = Transformer(name, stored.config, resolver, switch, capability=nowhere, dtype=torch.float32, names=names)
        for slot in model.slots:
            if isinstance(slot.packer, SplitPacker) and not isinstance(slot.scheme, Plain):
                yield from ((slot.scheme, kernel.shape) for kernel in slot.packer.kernels)
