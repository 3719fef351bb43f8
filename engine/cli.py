"""The `rollmill` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..quant import RollmillError
from .commands import bench, generate, inspect, quantize
from .env import cache_home, read_toggle_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of ours are one paragraph on stderr and exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except RollmillError as error:
        print(f"rollmill: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rollmill", description="RL rollouts from quantized weights.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="GRPO on a real MoE language model, every step a hot swap")
    demo.add_argument("kind", nargs="?", choices=("llm",), default="llm", help="llm (the only one so far)")
    demo.add_argument("--model", type=Path, help="a Mixtral folder (default: built from SmolLM2-135M)")
    demo.add_argument("--quant", choices=("nvfp4", "fp8"), default="nvfp4")
    demo.add_argument("--steps", type=int, default=8)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of the report")
    demo.set_defaults(run=_demo)

    generate.add(commands)
    quantize.add(commands)
    bench.add(commands)
    inspect.add(commands)

    env = commands.add_parser("env", help="the environment toggles, their values and meanings")
    env.add_argument("--json", action="store_true")
    env.set_defaults(run=_env)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from .demo.config import DemoConfig  # what only the demo needs is imported for the demo only
    from .demo.run import run_demo

    config = DemoConfig(quant=arguments.quant, steps=arguments.steps, seed=arguments.seed)
    run_demo(arguments.model, config, out=arguments.out, cache=Path(cache_home()) / "rollmill")


def _env(arguments: argparse.Namespace) -> None:
    rows, columns = read_toggle_rows(), ("name", "value", "possible", "meaning")
    if arguments.json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
        return
    table = Table()
    for column in columns:
        table.add_column(column, no_wrap=column in ("name", "possible"), overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False)


if __name__ == "__main__":
    sys.exit(main())
