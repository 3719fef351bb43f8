"""Every recorded diffusion checkpoint in a folder of fixtures, opened without a flag, in float32 arithmetic on a CPU.

    python benchmarks/dit_fixtures.py FOLDER

`<model>-<scheme>/` holds `transformer/` and `io.safetensors`, as tests/data/dit/README.md tells; `flux2-bfl-bf16` and
`flux2-bfl-nvfp4-comfy` hold files in Black Forest Labs' names. The engine's output is compared with the stored target
and with a second reader (benchmarks/dit_reader.py; Black Forest Labs' names through diffusers' own converter), and
stored values bit for bit: tiles with rows, one vendor's file with the other's. The targets were made by MKL's functions
and products without AVX; the script starts itself again so, since other last bits flip codes of quantized activations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dit_reader
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from dit_reader import Rounding, inputs_of, relative_error, stored_target
from msgspec import Struct
from msgspec.structs import replace
from record import Result, make_result, save
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from rollmill.engine import DiffusionEngine, EngineConfig
from rollmill.engine.dit.formats import open_transformer

INSTRUCTIONS = "SSE4_2"
LIMITS = {"bf16": 1e-6, "fp8": 1e-5, "nvfp4": 1e-6}
CONFIG = EngineConfig(dtype="float32", device="cpu")
COMFY_NAMES = {"0": "linear_in", "2": "linear_out", "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}


class Row(Struct, frozen=True):
    """Relative errors of one fixture's output; `target` None where none is stored. `bits`: values compared bit for bit
    and values that differ."""

    name: str
    limit: float
    live: float
    target: float | None = None
    live_target: float | None = None
    bits: tuple[int, int] = (0, 0)

    @property
    def ok(self) -> bool:
        return max(self.live, self.target or 0.0) <= self.limit and self.bits[1] == 0


def as_recorded() -> None:
    """Products as the targets were made: by MKL, which `matmul` takes where torch has no oneDNN."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.is_available = lambda: False  # pyright: ignore[reportAttributeAccessIssue]


def measure_folders(root: Path) -> Iterator[Row]:
    for place in sorted(path for path in root.iterdir() if (path / "transformer").is_dir()):
        io = load_file(place / "io.safetensors")
        live = run(dit_reader.read_folder(place / "transformer"), io)
        ours, target = engine_output(place / "transformer", io), stored_target(io)
        errors = relative_error(ours, live), relative_error(ours, target), relative_error(live, target)
        other = place.with_name(place.name.removesuffix("-swizzled")) / "transformer"
        counted = (0, 0) if other.parent == place else compare(place / "transformer", other)
        yield Row(place.name, LIMITS[place.name.split("-")[1]], *errors, bits=counted)


def measure_native(root: Path) -> Iterator[Row]:
    io = load_file(root / "flux2-bf16" / "io.safetensors")
    bf16, modelopt = root / "flux2-bf16" / "transformer", root / "flux2-nvfp4" / "transformer"
    path = root / "flux2-bfl-bf16" / "flux2.safetensors"
    live = run(converted(bf16, load_file(path), {}), io)
    ours, target = engine_output(path, io), stored_target(io)
    errors = relative_error(ours, live), relative_error(ours, target), relative_error(live, target)
    yield Row("flux2-bfl-bf16", LIMITS["bf16"], *errors, bits=compare(path, bf16))
    path = root / "flux2-bfl-nvfp4-comfy" / "flux2-nvfp4.safetensors"
    packed, truth = load_file(path), load_file(path.with_name("dequantised_by_comfy_kitchen_fp32.safetensors"))
    plain = {n: v for n, v in packed.items() if v.dtype == torch.bfloat16}
    scales = {name.removesuffix(".input_scale"): v for name, v in packed.items() if name.endswith(".input_scale")}
    once = {name: dequantized(path, name, "flashinfer") for name in truth}  # no target is stored: the kernels' rounding
    live = run(converted(bf16, plain | once, scales, "flashinfer"), io)
    same = [sum(pair) for pair in zip(compare(path, modelopt), compare_truth(path, truth), strict=True)]
    error = relative_error(engine_output(path, io), live)
    yield Row("flux2-bfl-nvfp4-comfy", LIMITS["nvfp4"], error, bits=(same[0], same[1]))


def run(model: Any, io: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(io), return_dict=False)[0].float()


def engine_output(path: Path, io: dict[str, Tensor]) -> Tensor:
    with DiffusionEngine(path, CONFIG) as engine:
        return run(engine.transformer, io)


def converted(
    folder: Path, native: dict[str, Tensor], scales: dict[str, Tensor], rounding: Rounding = "modelopt"
) -> Any:
    """diffusers' model with weights in Black Forest Labs' names, in float, and static NVFP4 input scales."""
    weights = convert_flux2_transformer_checkpoint_to_diffusers({name: value.float() for name, value in native.items()})
    by_module = {module: ("nvfp4", scale) for name, scale in scales.items() for module in flux2_modules(name)}
    model = dit_reader.empty(json.loads((folder / "config.json").read_text()))
    return dit_reader.loaded(model, weights, by_module, rounding)


def flux2_modules(name: str) -> list[str]:
    """diffusers' names of a block's linear."""
    kind, number, *rest = name.split(".")
    if kind == "single_blocks":
        return [f"single_transformer_blocks.{number}.{COMFY_NAMES[rest[0]]}"]
    block, (part, leaf) = f"transformer_blocks.{number}", rest
    if leaf == "qkv":
        names = ("to_q", "to_k", "to_v") if part == "img_attn" else ("add_q_proj", "add_k_proj", "add_v_proj")
        return [f"{block}.attn.{one}" for one in names]
    if leaf == "proj":
        return [f"{block}.attn.{'to_out.0' if part == 'img_attn' else 'to_add_out'}"]
    return [f"{block}.{'ff' if part == 'img_mlp' else 'ff_context'}.{COMFY_NAMES[leaf]}"]


def compare(one: Path, other: Path) -> tuple[int, int]:
    """Bytes of the tensors that both hold in one dtype (text qkv of the Comfy file is in BF16), and how many differ."""
    sides = open_transformer(one), open_transformer(other)
    total = wrong = 0
    for name in sorted(sides[0].tensor_names & sides[1].tensor_names):
        ours, theirs = (side.source.get(name) for side in sides)
        if ours.dtype == theirs.dtype:
            total += ours.nbytes
            wrong += int((as_bytes(ours) != as_bytes(theirs)).sum())
    return total, wrong


def as_bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def compare_truth(path: Path, truth: dict[str, Tensor]) -> tuple[int, int]:
    """Values of comfy-kitchen's own dequantization, and values that differ."""
    wrong = sum(int((dequantized(path, name, "modelopt") != value).sum()) for name, value in truth.items())
    return sum(value.numel() for value in truth.values()), wrong


def dequantized(path: Path, name: str, rounding: Rounding) -> Tensor:
    """float32 [rows, cols] of a weight in Black Forest Labs' names, from the stored values of diffusers' modules."""
    source = open_transformer(path).source
    parts = []
    for module in flux2_modules(name.removesuffix(".weight")):
        codes, blocks, scale_2 = (
            source.get(f"{module}.{leaf}") for leaf in ("weight", "weight_scale", "weight_scale_2")
        )
        parts.append(dit_reader.dequantize_nvfp4(codes, blocks, scale_2, (len(codes), codes.shape[1] * 2), rounding))
    return torch.cat(parts)


def results(rows: list[Row]) -> Iterator[Result]:
    for row in rows:
        told = f"against the second reader {row.live:.1e}"
        if row.target is not None:
            told = f"against the stored target, where the second reader is at {row.live_target:.1e}; {told}"
        if row.bits[0]:
            told += f"; {row.bits[0]:,} values bit for bit, {row.bits[1]} differ"
        value = row.live if row.target is None else row.target
        name = f"dit_fixture_{row.name.replace('-', '_')}"
        made = make_result(name, value, "relative error", limit=row.limit, note=told)
        yield replace(made, command="python benchmarks/dit_fixtures.py FOLDER")


def table(rows: list[Row]) -> Table:
    made = Table("fixture", "against the target", "the reader against it", "against the reader", "bit for bit", "ok")
    for row in rows:
        told = ["-" if error is None else f"{error:.1e}" for error in (row.target, row.live_target, row.live)]
        made.add_row(
            row.name, *told, f"{row.bits[0]:,}, {row.bits[1]} differ" if row.bits[0] else "-", "yes" if row.ok else "NO"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder
    if os.environ.get("MKL_ENABLE_INSTRUCTIONS") != INSTRUCTIONS:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MKL_ENABLE_INSTRUCTIONS": INSTRUCTIONS})
    as_recorded()
    rows = [*measure_folders(root), *measure_native(root)]
    Console(width=140).print(table(rows))
    save("dit_fixtures", list(results(rows)))
    if not all(row.ok for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
