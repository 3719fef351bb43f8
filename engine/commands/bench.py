"""`rollmill bench`: how fast a model generates here, and where the time goes."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import get_args

import torch
from msgspec import Struct, structs
from rich.console import Console
from rich.table import Table

from ...quant import Activation, QuantName
from ..config import EngineConfig, SamplingParams
from ..llm.engine import LanguageEngine
from ..step_profile import StepProfile, profile_steps

TOP_OPERATIONS = 12


class Rates(Struct, frozen=True):
    """Medians over the repeats: tokens a second of prompts, of new tokens, and milliseconds a decode step."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_step_ms: float
    total_tokens_per_second: float  # new tokens over the whole time, prefill included


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="tokens a second on random prompts, and where the time goes")
    parser.add_argument("model")
    parser.add_argument("--quant", choices=get_args(QuantName))
    parser.add_argument("--activation", choices=get_args(Activation))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    config = EngineConfig(quant=arguments.quant, activation=arguments.activation, prefix_cache=False)
    with LanguageEngine(arguments.model, config) as engine:
        generator = torch.Generator().manual_seed(0)
        shape = (arguments.prompts, arguments.prompt_tokens)
        vocab_size = engine.info()["vocab_size"]
        prompts = torch.randint(vocab_size, shape, generator=generator).tolist()
        rates = measure(engine, prompts, arguments.new_tokens, arguments.repeats)
        few = min(8, arguments.new_tokens)
        spent = profile_steps(lambda: _seconds(engine, prompts, few), engine.model.device)
    if arguments.json:
        print(json.dumps({**structs.asdict(rates), **_shares(spent)}, indent=2))
        return
    table = Table("figure", "value")
    for name, value in structs.asdict(rates).items():
        table.add_row(name.replace("_", " "), f"{value:.1f}")
    Console().print(table)
    for title, shares in _shares(spent).items():
        table = Table(title, "share of the time")
        for name, share in shares.items():
            table.add_row(name, f"{share:.1%}")
        Console().print(table, markup=False)


def _shares(spent: StepProfile) -> dict[str, dict[str, float]]:
    """Of all time that is accounted for, which on a GPU is the wall's: kinds of work, and the largest operations."""
    whole = sum(spent.by_kind.values()) or 1.0
    parts = {"kinds": spent.by_kind, "operations": dict(spent.largest[:TOP_OPERATIONS])}
    return {title: {name: seconds / whole for name, seconds in part.items()} for title, part in parts.items()}


def measure(engine: LanguageEngine, prompts: list[list[int]], new_tokens: int, repeats: int) -> Rates:
    """Generate greedily; one token a prompt times the prefill, the rest the decoding."""
    _seconds(engine, prompts, 1)
    prefill = statistics.median(_seconds(engine, prompts, 1) for _ in range(repeats))
    total = statistics.median(_seconds(engine, prompts, new_tokens) for _ in range(repeats))
    decode = max(total - prefill, 1e-9)
    return Rates(
        prefill_tokens_per_second=sum(map(len, prompts)) / prefill,
        decode_tokens_per_second=len(prompts) * (new_tokens - 1) / decode,
        decode_step_ms=1e3 * decode / max(1, new_tokens - 1),
        total_tokens_per_second=len(prompts) * new_tokens / total,
    )


def _seconds(engine: LanguageEngine, prompts: list[list[int]], new_tokens: int) -> float:
    start = time.perf_counter()
    engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True))
    return time.perf_counter() - start
