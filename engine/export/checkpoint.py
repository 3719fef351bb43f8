"""`quantize_checkpoint`: a BF16 folder -> a folder in ModelOpt's layout, all or nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch

from ...quant import Capability, ConfigError, Plain, UnsupportedError
from ...weight_sync import SyncPlan
from ..checkpoint import Checkpoint, is_diffusers
from ..config import EngineConfig
from ..env import Toggles
from ..kernel_names import KernelNames
from ..llm.decoder import Decoder
from ..llm.models import find_family
from ..llm.parts import Parts
from ..schemes import SchemeResolver
from ..sync_plan import make_sync_plan
from .building import building, check_empty
from .calibration import Calibration, calibrate
from .layout import QuantFormat, hf_quant_config, quantization_config
from .report import ExportReport, Progress
from .shards import ShardWriter
from .weights import SourceWeights, stored_tensors

MAX_SHARD_BYTES = 5 * 10**9
COPIED_FILES = (  # what goes along as it is
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
)


def quantize_checkpoint(
    path: str | Path,
    out: str | Path,
    quant: QuantFormat,
    *,
    keep: Sequence[str] | None = None,
    texts: str | Path | None = None,
    tokens_per_sequence: int = 512,
    sequences: int = 64,
    device: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda phase, done, total: None,
) -> ExportReport:
    """Write the BF16 checkpoint at `path` (a folder or hub id) to `out` as ModelOpt would, in FP8 or NVFP4.

    The bytes are those of `EngineConfig(quant=quant, keep=keep)` over the same BF16 weights. With `texts` (a text
    file, or .jsonl with "text" or "messages") the BF16 engine runs over up to `sequences` x `tokens_per_sequence`
    tokens, and every quantized module gets `input_scale` = amax / 448 (FP8) or amax / 2688 (NVFP4). Without, no
    `input_scale` is written and activations are quantized per token. `out` appears once its last byte is written.
    A diffusion transformer goes through `quantize_diffusion`.
    """
    if is_diffusers(path):
        raise UnsupportedError(
            f"{path} is no language model", ["use quantize_diffusion, which takes embeds, not texts"]
        )
    start, out = time.perf_counter(), Path(out)
    _check_request(out, tokens_per_sequence, sequences)
    checkpoint = Checkpoint(path)
    plan, warnings = plan_export(checkpoint, quant, keep)
    quantized = {slot.name: slot for slot in plan.slots if not isinstance(slot.scheme, Plain)}
    calibration = None
    with SourceWeights(checkpoint.source, plan) as source:
        if texts is not None:
            calibration = calibrate(
                checkpoint.folder,
                quantized,
                Path(texts),
                length=tokens_per_sequence,
                count=sequences,
                device=device,
                progress=progress,
            )
        with building(out) as folder:
            writer = ShardWriter(folder, max_shard_bytes)
            files = _write_tensors(writer, source, calibration, progress)
            _write_configs(folder, checkpoint, quant, kept_modules(plan), static=calibration is not None)
    return ExportReport(
        folder=str(out),
        quant=quant,
        activation="per_token" if calibration is None else "static",
        modules=sum(len(unit) for slot in quantized.values() for unit in slot.modules),
        kept=tuple(kept_modules(plan)),
        tensors=sum(map(len, writer.files)),
        files=files,
        bytes_in=sum(file.stat().st_size for file in checkpoint.source.files),
        bytes_out=writer.total_bytes,
        calibration_sequences=None if calibration is None else calibration.sequences,
        calibration_tokens=None if calibration is None else calibration.tokens,
        seconds=time.perf_counter() - start,
        warnings=tuple(warnings),
    )


def plan_export(checkpoint: Checkpoint, quant: QuantFormat, keep: Sequence[str] | None) -> tuple[SyncPlan, list[str]]:
    """The slots that an engine would have for this format, without their memory, and what to warn of."""
    if checkpoint.quant_plan() is not None:
        raise UnsupportedError(
            f"{checkpoint.folder} is quantized already",
            ["quantizing quantized weights loses twice: give the BF16 checkpoint"],
        )
    config = EngineConfig(quant=quant, keep=keep, activation="per_token")
    resolver = SchemeResolver(config, None, (), Toggles())
    nowhere = Capability(torch.device("meta"), None, ())
    parts = Parts(
        resolver, nowhere, torch.float32, KernelNames("reference", "reference")
    )  # shapes only: nothing is computed
    model = Decoder(checkpoint.read_config(find_family(checkpoint.architectures)), parts)
    return make_sync_plan(model, None), resolver.finish()


def kept_modules(plan: SyncPlan) -> list[str]:
    """Modules with a matrix in BF16, as ModelOpt lists them; `lm_head` also where it is tied to the embeddings."""
    slots = [slot for slot in plan.slots if isinstance(slot.scheme, Plain) and slot.shape.cols is not None]
    modules = {module for slot in slots for unit in slot.modules for module in unit}
    return sorted(modules | {name.removesuffix(".weight") for name in plan.tied})


def _check_request(out: Path, tokens_per_sequence: int, sequences: int) -> None:
    if tokens_per_sequence < 1 or sequences < 1:
        raise ConfigError(f"{sequences} sequences of {tokens_per_sequence} tokens: both must be at least 1")
    check_empty(out)


def _write_tensors(
    writer: ShardWriter, source: SourceWeights, calibration: Calibration | None, progress: Progress
) -> int:
    total = sum(slot.shape.num_units for slot in source.plan.slots)
    for done, tensors in enumerate(stored_tensors(source, {} if calibration is None else calibration.amax)):
        progress("quantizing", min(done, total), total)
        for name, value in tensors:
            writer.add(name, value)
    progress("quantizing", total, total)
    return writer.close()


def _write_configs(
    folder: Path, checkpoint: Checkpoint, quant: QuantFormat, kept: Sequence[str], *, static: bool
) -> None:
    config = {**checkpoint.raw_config, "quantization_config": quantization_config(quant, kept, static=static)}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    (folder / "hf_quant_config.json").write_text(json.dumps(hf_quant_config(quant, kept), indent=4))
    for file in sorted(checkpoint.folder.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COPIED_FILES):
            shutil.copyfile(file, folder / file.name)
