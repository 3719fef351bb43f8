"""`quantize_diffusion`: a BF16 diffusion transformer, alone or in its pipeline -> ModelOpt's layout, all or nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...quant import Capability, Plain, UnsupportedError, WeightSlot
from ...quant.numerics import decode_scale
from ...weight_sync import CoverageError, ShapeError, SyncPlan
from ...weight_sync.ledger import names_of
from ...weight_sync.pairs import split
from ...weight_sync.staging import check_finite
from ..checkpoint import locate
from ..config import EngineConfig
from ..dit.checkpoint import DiffusionCheckpoint
from ..dit.families import default_keep
from ..dit.formats import StoredTransformer
from ..dit.params import DiffusionParams
from ..dit.transformer import PrecisionSwitch, Transformer
from ..env import Toggles
from ..kernel_names import KernelNames
from ..schemes import SchemeResolver
from .building import building, check_empty
from .diffusion_calibration import DiffusionCalibration, calibrate_diffusion
from .layout import QuantFormat, quantization_config, summarize_modules
from .report import ExportReport, Progress
from .shards import DIFFUSERS_STEM, ShardWriter
from .weights import Named, shard_tensors

MAX_SHARD_BYTES = 10 * 10**9
CALIBRATION_STEPS = 8


def quantize_diffusion(
    path: str | Path,
    out: str | Path,
    quant: QuantFormat,
    *,
    keep: Sequence[str] | None = None,
    embeds: str | Path | None = None,
    params: DiffusionParams | None = None,
    base: str | None = None,
    device: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda phase, done, total: None,
) -> ExportReport:
    """Write the BF16 transformer at `path` (its folder, a pipeline's folder, a file or a hub id) to `out` as ModelOpt
    would, in FP8 or NVFP4; of a pipeline, the other components are copied.

    The bytes are those of `EngineConfig(quant=quant, keep=keep)` over the same weights; `keep` None: the family's. With
    `embeds` (a safetensors file, see `read_embeds`) the BF16 engine denoises one sample a prompt as `params` say, and
    every quantized module gets `input_scale` = amax / 448 (FP8) or amax / 2688 (NVFP4) of its inputs. Without, no
    `input_scale` is written and activations are quantized per token. `base`: the pipeline or transformer that brings
    what a file of weights lacks (`EngineConfig.base`). `out` appears once its last byte is written.
    """
    start, out = time.perf_counter(), Path(out)
    check_empty(out)
    source = EngineConfig(quant="bf16", base=base, device=device)
    checkpoint = DiffusionCheckpoint(path, source)
    exports = [_Export(name, stored, quant, keep) for name, stored in checkpoint.transformers.items()]
    calibration = None
    if embeds is not None:
        wanted = {module for export in exports for module in export.modules}
        chosen: DiffusionParams = DiffusionParams(steps=CALIBRATION_STEPS) if params is None else params
        calibration = calibrate_diffusion(path, source, Path(embeds), chosen, wanted, progress)
    nested = any((locate(path) / name).is_dir() for name in checkpoint.transformers) or checkpoint.folder is not None
    with building(out) as folder:
        for export in exports:
            place = folder / export.name if nested else folder
            place.mkdir(exist_ok=True)
            export.write(place, calibration, max_shard_bytes, progress)
        if checkpoint.folder is not None:
            _copy_rest(checkpoint.folder, checkpoint.transformers, folder)
    return ExportReport(
        folder=str(out),
        quant=quant,
        activation="per_token" if calibration is None else "static",
        modules=sum(len(export.modules) for export in exports),
        kept=tuple(name for export in exports for name in export.kept),
        tensors=sum(sum(map(len, export.writer.files)) for export in exports),
        files=sum(len(export.writer.files) for export in exports),
        bytes_in=sum(export.bytes_in for export in exports),
        bytes_out=sum(export.writer.total_bytes for export in exports),
        calibration_sequences=None if calibration is None else calibration.samples,
        calibration_tokens=None if calibration is None else calibration.tokens,
        seconds=time.perf_counter() - start,
        warnings=tuple(warning for export in exports for warning in export.warnings),
        is_diffusion=True,
    )


class _Export:
    """One transformer on its way out: slots without memory say what belongs together."""

    writer: ShardWriter
    quant: QuantFormat

    def __init__(self, name: str, stored: StoredTransformer, quant: QuantFormat, keep: Sequence[str] | None) -> None:
        if stored.plan is not None:
            raise UnsupportedError(
                f"{name} is quantized already",
                ["quantizing quantized weights loses twice: give the BF16 checkpoint"],
            )
        self.name, self.stored, self.quant = name, stored, quant
        config = EngineConfig(quant=quant, keep=keep, activation="per_token")
        kind = str(stored.config.get("_class_name"))
        resolver = SchemeResolver(config, None, (), Toggles(), default_keep(kind))
        nowhere = Capability(torch.device("meta"), None, ())
        model = Transformer(
            name,
            stored.config,
            resolver,
            PrecisionSwitch(),
            capability=nowhere,
            dtype=torch.float32,  # shapes only: nothing is computed
            names=KernelNames("reference"),
        )
        self.warnings = resolver.finish()
        self.plan = SyncPlan(model.slots)
        self.kept = model.unquantized_modules()
        self.modules = [
            module for slot in model.slots if not isinstance(slot.scheme, Plain) for module in slot.modules[0]
        ]
        self.bytes_in = 0

    def write(self, folder: Path, calibration: DiffusionCalibration | None, max_bytes: int, progress: Progress) -> None:
        self.writer = ShardWriter(folder, max_bytes, stem=DIFFUSERS_STEM)
        for done, tensors in enumerate(self._stored_tensors({} if calibration is None else calibration.amax), 1):
            progress(f"quantizing {self.name}", min(done, len(self.plan.slots)), len(self.plan.slots))
            for name, value in tensors:
                self.writer.add(name.removeprefix(f"{self.name}."), value)
        self.writer.close()
        names = [module.removeprefix(f"{self.name}.") for module in self.modules]
        ignored = summarize_modules(self.kept, names)
        described = quantization_config(self.quant, ignored, static=calibration is not None)
        config = {**self.stored.config, "quantization_config": described}
        (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")

    def _stored_tensors(self, amax: Mapping[str, Tensor]) -> Iterator[list[Named]]:
        """Everything to write, a list a slot, in the order in which slots become complete."""
        for slot, shards in self._whole_weights(self.stored.source):
            modules = slot.modules[0]
            if isinstance(slot.scheme, Plain):
                yield [(f"{m}.{slot.scheme.tensor}", shard) for m, shard in zip(modules, shards, strict=True)]
                continue
            stored = slot.scheme.quantize(torch.cat(shards), slot.shape)
            if amax:
                largest = torch.stack([amax[module] for module in modules]).amax()  # siblings read one input
                stored["input_scale"] = decode_scale(largest, slot.scheme.code_max).expand(len(modules))
            yield [named for shard in range(len(modules)) for named in shard_tensors(slot, modules, shard, stored)]

    def _whole_weights(self, source: Iterable[Named]) -> Iterator[tuple[WeightSlot, list[Tensor]]]:
        """Every slot with its shards, in the dtype that they are stored in: BF16, or float32."""
        parts: dict[WeightSlot, dict[int, Tensor]] = {}
        unexpected, duplicate, done = [], [], set()
        for name, value in source:
            self.bytes_in += value.nbytes
            target = self.plan.resolve(f"{self.name}.{name}")
            if target is None:
                unexpected.append(name)
                continue
            shards = parts.setdefault(target.slot, {})
            for _, shard, part in split(name, target, value):
                if shard in shards or target.slot in done:
                    duplicate.append(name)
                else:
                    shards[shard] = _checked(name, part, target.slot, shard)
            if len(shards) == len(target.slot.shape.rows) and target.slot not in done:
                done.add(target.slot)
                parts[target.slot] = {}
                yield target.slot, [shards[i] for i in range(len(shards))]
        missing = [name for slot in self.plan.slots if slot not in done for name in names_of(slot)]
        if missing or unexpected or duplicate:
            raise CoverageError(missing, unexpected, duplicate)


def _checked(name: str, value: Tensor, slot: WeightSlot, shard: int) -> Tensor:
    """A shard as its slot stores it, copied: a source may reuse its memory."""
    shape = slot.shape
    tail = shape.trailing if shape.cols is None else (shape.cols,)
    expected = (shape.rows[shard], *tail)
    if tuple(value.shape) != expected and not (value.ndim == 0 and expected == (1,)):
        raise ShapeError(f"{name}: expected shape {list(expected)}, got {list(value.shape)}")
    dtype = slot.scheme.dtype if isinstance(slot.scheme, Plain) else torch.bfloat16
    copied = value.to(dtype, copy=True)
    check_finite(name, copied)
    return copied


def _copy_rest(pipeline: Path, written: Collection[str], folder: Path) -> None:
    """The other components and model_index.json, as they are."""
    for item in sorted(pipeline.iterdir()):
        if item.name in written or item.name.startswith("."):
            continue
        copy = shutil.copytree if item.is_dir() else shutil.copyfile
        copy(item, folder / item.name)
