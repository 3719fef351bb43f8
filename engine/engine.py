"""`Engine`: one policy, its weights and the way to swap them. What it generates is its subclass's business."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import msgspec
import torch

from ..quant import Capability, UnsupportedError, WeightSlot, clipping_shares, find_capability
from ..weight_sync import Policy, Source, SyncPlan, UpdateReport, WeightSession, staging_shortage
from .checkpoint import is_diffusers
from .config import EngineConfig
from .env import pin_nvfp4_recipe
from .errors import ClosedError, RequestError
from .prewarm import prewarm
from .step_gate import StepGate

log = logging.getLogger("rollmill")

SleepTag = Literal["weights", "kv_cache"]


class Engine:
    """A rollout engine for one policy: quantized weights that a trainer swaps, and generation from them.

    `path` is a folder in Hugging Face or diffusers layout (BF16 or quantized), a file of diffusion weights, or a hub
    id. `Engine(path)` makes a `LanguageEngine` or a `DiffusionEngine`, whichever `path` holds.
    """

    device: torch.device

    def __new__(cls, path: str | Path, config: EngineConfig | None = None) -> Self:
        kind: Any = cls if cls is not Engine else _engine_class(path)
        return super().__new__(kind)

    def __init__(self, path: str | Path, config: EngineConfig | None = None) -> None:
        self.path, self.config = str(path), config or EngineConfig()
        if self.config.tp != 1 or self.config.ep != 1:
            raise UnsupportedError(f"tp={self.config.tp}, ep={self.config.ep}", ["only tp=1 and ep=1 are built"])

    def _find_device(self) -> Capability:
        """The device that the config asks for, and FlashInfer set up to compute as our reference does."""
        capability = find_capability(self.config.device)
        if capability.flashinfer is not None:
            pin_nvfp4_recipe()
        return capability

    def _load(self, plan: SyncPlan, source: Source, warnings: Sequence[str], checked_tokens: Iterable[int]) -> None:
        """The cold load: the first swap of a new policy. Then kernels are built and checked for these many tokens."""
        self._policy = Policy(plan, self.config.swap, self.config.master)
        report = self._policy.update(source, None)
        self.load_report = msgspec.structs.replace(report, warnings=(*warnings, *report.warnings))
        self.self_checks = prewarm(plan.slots, checked_tokens)

    def _warn_of_shortage(self) -> None:
        """With all of its memory taken: tell if swaps will find none."""
        shortage = staging_shortage(self._policy.plan.slots, self.config.swap)
        if shortage is not None:
            log.warning("%s", shortage)
            warnings = (*self.load_report.warnings, shortage)
            self.load_report = msgspec.structs.replace(self.load_report, warnings=warnings)

    def generate(self, prompts: Any, params: Any = None) -> list[Any]:
        """Sample from the policy: `LanguageEngine.generate`, `DiffusionEngine.generate`."""
        raise NotImplementedError

    # weights

    @property
    def weight_version(self) -> str | None:
        """The policy version being served; None while the engine is poisoned, and from sleep to the next full swap."""
        return self._policy.version

    def update_weights(self, source: Source, version: str | None = None) -> UpdateReport:
        """Swap in the weights of a dict, an iterator of (name, tensor) or a safetensors folder; all or nothing."""
        self._check_open()
        return self._policy.update(source, version)

    def weight_session(self, version: str | None = None) -> WeightSession:
        """The same, in buckets: `with engine.weight_session() as session: session.load(bucket)`."""
        self._check_open()
        return self._policy.begin(version)

    def digest(self, source: Source | None = None) -> str:
        """SHA-256 hex over all stored values being served (weights and scales), the same for every kernel.

        With `source`: the digest that a swap to it would give, for a trainer that wants to know before or after.
        """
        self._check_open()
        return self._policy.digest() if source is None else self._policy.digest_of(source)

    # sleeping

    def sleep(self, tags: Sequence[SleepTag] = get_args(SleepTag)) -> None:
        """Give memory back: of "weights" (scales that no trainer sends are kept), of the "kv_cache", or of both.

        Running requests wait; without the KV cache they are computed again. Sleeping twice changes nothing.
        """
        self._check_tags(tags)
        if "weights" in tags:
            self._policy.sleep()
        if "kv_cache" in tags:
            self._free_cache()

    def wake(self, tags: Sequence[SleepTag] = get_args(SleepTag)) -> UpdateReport | None:
        """Take the memory again.

        Weights come back empty, and nothing is generated until a full `update_weights`; with a kept master
        (`EngineConfig(master="host")`) they are restored, and the report of that swap comes back.
        """
        self._check_tags(tags)
        if "kv_cache" in tags:
            self._allocate_cache()
        return self._policy.wake() if "weights" in tags else None

    def _check_tags(self, tags: Sequence[SleepTag]) -> None:
        self._check_open()
        wrong = sorted(set(tags) - set(get_args(SleepTag)))
        if wrong:
            raise RequestError(f"tags {wrong}; possible: {', '.join(get_args(SleepTag))}")

    def _free_cache(self) -> None:
        """For engines that have a KV cache."""

    def _allocate_cache(self) -> None:
        """For engines that have a KV cache."""

    # what a kept master gives (EngineConfig(master="host"))

    def update_lora(
        self, source: Source, alpha: float | None = None, rank: int | None = None, version: str | None = None
    ) -> UpdateReport:
        """Merge an adapter into the base weights, in place of the adapter before, and requantize; all or nothing.

        `source`: a dict or iterator in PEFT's names (`...q_proj.lora_A.weight` [rank, in], `lora_B` [out, rank]), or
        PEFT's folder, whose adapter_config.json says `alpha` and `rank` where these are None, or diffusers' file
        (pytorch_lora_weights.safetensors), whose header may say so.
        """
        self._check_open()
        return self._policy.update_lora(source, alpha, rank, version)

    def remove_lora(self, version: str | None = None) -> UpdateReport:
        """Take the adapter off: the bytes are those of the base weights again."""
        self._check_open()
        return self._policy.remove_lora(version)

    def quantization_error(self) -> dict[str, float]:
        """Layer -> ||dequantize(quantize(W)) - W|| / ||W|| (Frobenius), W the BF16 weights that are served.

        Layers that came quantized have no BF16 to compare with and are not listed, nor are unquantized ones.
        """
        self._check_open()
        return self._policy.quantization_error()

    # life

    @property
    def _slots(self) -> Sequence[WeightSlot]:
        return self._policy.plan.slots

    def info(self) -> dict[str, Any]:
        """What the engine is, holds and serves."""
        self._check_open()
        slots = self._slots
        return {
            "path": self.path,
            "weight_version": self.weight_version,
            "poisoned": self._policy.poisoned,
            "swap": self.config.swap,
            "dtype": self.config.dtype,
            "device": str(self.device),
            "quant": sorted({slot.scheme.name for slot in slots}),
            "activation": sorted({slot.scheme.activation for slot in slots} - {"none"}),
            "clipping": clipping_shares(slots),
            "weight_bytes": sum(slot.num_bytes for slot in slots),
            "asleep": self._asleep_tags(),
            **self._more_info(),
            "master_bytes": self._policy.master_bytes,
            "mirror_bytes": self._policy.mirror_bytes,
            "warnings": list(self.load_report.warnings),
        }

    def _more_info(self) -> dict[str, Any]:
        return {}

    def _asleep_tags(self) -> list[SleepTag]:
        return ["weights"] if self._policy.state == "asleep" else []

    def close(self) -> None:
        """Free the weights; the engine cannot be used afterwards."""
        if not self._policy.closed:
            gate = self._stop()
            with gate.visit():  # what was under way has ended
                self._policy.close()
            self._drop()

    def _stop(self) -> StepGate:
        """End what is being generated; returns the gate of its steps."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Let go of what holds memory."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._policy.closed:
            raise ClosedError("this engine has been closed; open a new one")


def _engine_class(path: str | Path) -> type[Engine]:
    """What `path` holds; a half's libraries are imported for that half only."""
    if is_diffusers(path):
        from .dit.engine import DiffusionEngine

        return DiffusionEngine
    from .llm.engine import LanguageEngine

    return LanguageEngine
