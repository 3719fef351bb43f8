"""`rollmill inspect`: what a checkpoint holds, from its headers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import get_args

import msgspec
from rich.console import Console
from rich.table import Table

from ...quant import Activation, ConfigError, QuantName
from ..checkpoint import locate
from ..dit.formats import check_layout, say
from ..inventory import Inventory, StoredModule, StoredTensor, inspect_checkpoint
from .inspect_kernels import show_kernels


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "inspect",
        help="what a checkpoint holds: schemes, layouts, bytes, scales, kept modules",
        description="Reads configs and file headers, no tensor (but for --against, and some rows where only values "
        "tell how NVFP4 lies). Modules that differ in numbers only share a row.",
    )
    parser.add_argument(
        "path", nargs="?", help="model folder, diffusion pipeline, file of diffusion weights, or hub id"
    )
    parser.add_argument(
        "--against", metavar="BF16", help="BF16 transformer: read some NVFP4 layers in every layout and compare"
    )
    parser.add_argument("--json", action="store_true", help="every module by itself")
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument(
        "--kernels",
        action="store_true",
        help="which kernel computes which layer, and why no other; without a path for usual shapes",
    )
    kernels.add_argument("--sm", type=int, help="on a GPU of this compute capability, here or not (90, 100, 103, 120)")
    kernels.add_argument("--quant", choices=get_args(QuantName), help="as EngineConfig's quant")
    kernels.add_argument("--activation", choices=get_args(Activation), help="as EngineConfig's activation")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the inventory, the kernels, or the comparison with BF16 weights."""
    if arguments.kernels:
        show_kernels(arguments)
        return
    if arguments.path is None:
        raise ConfigError("inspect what? give a path, or --kernels")
    if arguments.against is not None:
        _compare(arguments)
        return
    inventory = inspect_checkpoint(arguments.path)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(inventory), indent=2).decode())
        return
    console = Console(highlight=False)
    for table in (_module_table(inventory), _total_table(inventory)):
        console.print(table, markup=False)
    for line in _remarks(inventory):
        console.print(line, markup=False)


def _compare(arguments: argparse.Namespace) -> None:
    check = check_layout(locate(arguments.path), locate(arguments.against))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(check), indent=2).decode())
        return
    table = Table("NVFP4 layout", "correlation", "relative error", "fits")
    for reading in check.readings:
        fits = "yes" if reading.layout == check.fits else ""
        table.add_row(say(reading.layout), f"{reading.correlation:.4f}", f"{reading.error:.4f}", fits)
    console = Console(highlight=False)
    console.print(table, markup=False)
    console.print(f"read: {', '.join(check.modules)}", markup=False)


def _module_table(inventory: Inventory) -> Table:
    table = Table()
    for name in ("module", "x", "scheme", "layout", "scales", "bytes"):
        table.add_column(name, justify="right" if name in ("x", "bytes") else "left")
    for modules in group_alike(inventory.modules):
        first = modules[0]
        scales = [key for key in first.tensors if key.endswith(("_scale", "_scale_2", "_quant"))]
        layout = [f"{key} {layout_of(t)}" for key, t in first.tensors.items() if key in ("weight", "bias")]
        table.add_row(
            name_of_group(modules),
            str(len(modules)),
            first.scheme if first.packing is None else f"{first.scheme}\n{first.packing}",
            "\n".join(layout),
            "\n".join(f"{key} {layout_of(first.tensors[key])}" for key in scales),
            f"{sum(m.bytes for m in modules):,}",
        )
    return table


def _total_table(inventory: Inventory) -> Table:
    table = Table("scheme", "modules", "weights", "bytes", "bits a weight", "with input_scale")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [(scheme, t.modules, t.weights, t.bytes, t.static) for scheme, t in inventory.totals.items()]
    static = sum(t.static for t in inventory.totals.values())
    rows.append(("total", len(inventory.modules), inventory.weights, inventory.bytes, static))
    for scheme, modules, weights, count, static in rows:
        bits = f"{count * 8 / weights:.2f}" if weights else "-"
        table.add_row(scheme, f"{modules:,}", f"{weights:,}", f"{count:,}", bits, f"{static:,}")
    return table


def _remarks(inventory: Inventory) -> Iterator[str]:
    says = "no quantization" if inventory.quant is None else inventory.quant
    kv = "" if inventory.kv_cache is None else f", KV cache {inventory.kv_cache}"
    yield f"{inventory.path}: {', '.join(inventory.architectures)}; {inventory.files} files; config: {says}{kv}"
    if inventory.kept:
        kept = [m for m in inventory.modules if m.name in set(inventory.kept)]
        yield f"kept: {', '.join(name_of_group(group) for group in group_alike(kept))}"
    for warning in inventory.warnings:
        yield f"warning: {warning}"


def layout_of(tensor: StoredTensor) -> str:
    """`BF16 [8, 16]`."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def group_alike(modules: Iterable[StoredModule]) -> list[list[StoredModule]]:
    """Modules whose names differ in numbers only, and whose tensors are alike, in the order of their first."""
    groups: dict[tuple[object, ...], list[StoredModule]] = {}
    for module in modules:
        pattern = tuple("*" if part.isdecimal() else part for part in module.name.split("."))
        groups.setdefault((pattern, module.scheme, tuple(module.tensors.items())), []).append(module)
    return list(groups.values())


def name_of_group(modules: list[StoredModule]) -> str:
    """`model.layers.0-3.mlp.gate`: every number of the names as the range of its values."""
    parts = zip(*(module.name.split(".") for module in modules), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else _ranges({int(p) for p in part}) for part in parts)


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
