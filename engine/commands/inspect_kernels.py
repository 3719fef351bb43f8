"""`rollmill inspect --kernels`: scheme x shape x kernel, and why."""

from __future__ import annotations

import argparse
from itertools import groupby

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from ...quant import Capability, describe_device, find_capability
from ..config import EngineConfig
from ..env import pin_nvfp4_recipe
from ..kernel_table import KernelRow, kernel_table


def show_kernels(arguments: argparse.Namespace) -> None:
    """Print the table, or its rows as JSON."""
    capability = _capability(arguments.sm)
    config = EngineConfig(quant=arguments.quant, activation=arguments.activation)
    rows = kernel_table(arguments.path, config, capability)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return
    console = Console(highlight=False)
    console.print(_table(rows), markup=False)
    found = capability.flashinfer
    libraries = [
        f"flashinfer {found.version}" if found and name == "flashinfer" else name for name in capability.libraries
    ]
    console.print(f"{capability}, BF16 arithmetic; libraries here: {', '.join(libraries) or 'none'}", markup=False)


def _capability(sm: int | None) -> Capability:
    """The device that is here, or one that may not be: then nothing is computed."""
    here = find_capability()
    if sm is None or sm == here.sm:
        if here.flashinfer is not None:
            pin_nvfp4_recipe()
        return here
    return describe_device(torch.device("meta"), sm)


def _table(rows: list[KernelRow]) -> Table:
    table = Table("layers", "scheme", "activations", "shape", "kernel", "verdict")
    table.columns[0].justify = "right"
    for product, alike in groupby(rows, lambda row: (row.layers, row.scheme, row.activation, row.shape)):
        named = [str(product[0]), product[1], product[2], str(list(product[3]))]
        for verdict, kernels in groupby(alike, lambda row: (row.verdict, *row.self_check)):
            table.add_row(*named, "\n".join(row.kernel for row in kernels), "\n".join(verdict))
            named = [""] * len(named)
        table.add_section()
    return table
