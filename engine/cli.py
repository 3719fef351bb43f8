"""The `rollmill` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from ..quant import Activation, ConfigError, QuantName, RollmillError
from .commands import bench, inspect, quantize
from .config import EngineConfig, SamplingParams
from .env import cache_home, read_toggle_rows
from .llm.engine import LanguageEngine
from .types import Completion


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

    generate = commands.add_parser("generate", help="sample from a model folder; print text and log-probs")
    generate.add_argument("model")
    generate.add_argument("--prompt", action="append", required=True, help="may be repeated")
    generate.add_argument("--chat", action="store_true", help="put every prompt through the chat template")
    generate.add_argument("--quant", choices=get_args(QuantName))
    generate.add_argument("--activation", choices=get_args(Activation))
    generate.add_argument("--n", type=int, default=1)
    generate.add_argument("--temperature", type=float, default=1.0)
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--json", action="store_true")
    generate.set_defaults(run=_generate)

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


def _generate(arguments: argparse.Namespace) -> None:
    prompts = arguments.prompt
    if arguments.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    params = SamplingParams(
        n=arguments.n,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    with LanguageEngine(
        arguments.model, EngineConfig(quant=arguments.quant, activation=arguments.activation)
    ) as engine:
        outs = engine.generate(prompts, params)
        shown = [prompt for prompt in arguments.prompt for _ in range(arguments.n)]
        if arguments.json:
            print(json.dumps([_as_json(prompt, out) for prompt, out in zip(shown, outs, strict=True)], indent=2))
        else:
            _print_completions(engine, shown, outs)


def _as_json(prompt: str, out: Completion) -> dict[str, object]:
    assert out.logprobs is not None
    return {
        "prompt": prompt,
        "text": out.text,
        "token_ids": out.token_ids,
        "logprobs": out.logprobs.tolist(),
        "finish_reason": out.finish_reason,
        "seed": out.seed,
        "weight_version": out.weight_versions[0].version,
    }


def _print_completions(engine: LanguageEngine, prompts: Sequence[str], outs: Sequence[Completion]) -> None:
    console = Console(highlight=False)
    for prompt, out in zip(prompts, outs, strict=True):
        assert engine.tokenizer is not None
        assert out.logprobs is not None
        console.rule(f"{prompt[:60]!r}  seed {out.seed}", align="left")
        console.print(out.text, markup=False)
        table = Table("token", "id", "log-prob", box=None)
        for token, logprob in zip(out.token_ids, out.logprobs.tolist(), strict=True):
            table.add_row(repr(engine.tokenizer.decode([token])), str(token), f"{logprob:.4f}")
        console.print(table, markup=False)
        console.print(f"{out.finish_reason}, mean log-prob {out.logprobs.mean():.4f}")


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
