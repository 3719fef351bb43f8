"""The `rollmill` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..quant import ConfigError, RollmillError
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

    demo = commands.add_parser("demo", help="RL on a small model with quantized rollouts, every step a hot swap")
    demo.add_argument(
        "kind", nargs="?", choices=("llm", "dit"), default="llm", help="a language model (default), or one of images"
    )
    demo.add_argument("--model", type=Path, help="llm: a Mixtral folder (default: built from SmolLM2-135M)")
    demo.add_argument("--quant", choices=("nvfp4", "fp8"), default="nvfp4")
    demo.add_argument("--steps", type=int, help="default: 8 of llm, 16 of dit")
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
    cache, settings = Path(cache_home()) / "rollmill", {"quant": arguments.quant, "seed": arguments.seed}
    if arguments.steps is not None:
        settings["steps"] = arguments.steps
    if arguments.kind == "llm":
        from .demo.config import DemoConfig  # what only the demo needs is imported for the demo only
        from .demo.run import run_demo

        run_demo(arguments.model, DemoConfig(**settings), out=arguments.out, cache=cache)
        return
    if arguments.model is not None:
        raise ConfigError("--model is for `demo llm`; `demo dit` trains its own model")
    from .demo.dit.config import DitDemoConfig
    from .demo.dit.run import run_dit_demo

    run_dit_demo(DitDemoConfig(**settings), out=arguments.out, cache=cache)


def _env(arguments: argparse.Namespace) -> None:
    rows, columns = read_toggle_rows(), ("name", "value", "possible", "meaning")
    if arguments.json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
        return
    table = Table()
    for column in columns:
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False)


if __name__ == "__main__":
    sys.exit(main())
