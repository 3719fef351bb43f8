"""Engines over tiny models, steps that can be watched, calls in other threads, and transformers as the judge."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from rollmill.engine import Completion, Engine, EngineConfig

PATIENCE = 30.0  # seconds until something counts as stuck


@pytest.fixture(scope="session")
def model(hf_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """`model("llama", seed=1)`: made once."""
    return functools.cache(hf_model)


@pytest.fixture(scope="session")
def folder(hf_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's checkpoint, with a byte-level tokenizer of 200 tokens; written once."""

    @functools.cache
    def write(family: str) -> Path:
        path = tmp_path_factory.mktemp(family)
        hf_model(family).to(torch.bfloat16).save_pretrained(path)
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 126, c))[:200]
        tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
        return path

    return write


@pytest.fixture(params=[False, True], ids=["step_by_step", "overlapped"])
def open_engine(folder: Callable[[str], Path], request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """`open_engine("llama", kv_cache_tokens=64)`: float32; closed after the test. Steps wait for each other, or a step
    is launched before the tokens of the one before are known."""
    opened: list[Engine] = []

    def make(family: str = "llama", **options: Any) -> Engine:
        options = {"dtype": "float32", "overlap": request.param} | options
        opened.append(Engine(folder(family), EngineConfig(**options)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


class Steps:
    """Counts an engine's steps and the tokens they compute; `seconds` is how long each is held up."""

    def __init__(self, engine: Engine) -> None:
        self.count, self.sizes, self.seconds = 0, list[int](), 0.0
        self.before: Callable[[], None] | None = None
        self._gate, self._held = engine.rollouts.gate, 0
        self._hidden = engine.model.hidden
        engine.model.hidden = self._watched

    def _watched(self, ids: Tensor, *args: Any) -> Tensor:
        self.count += 1
        self.sizes.append(len(ids))
        if self.before is not None:
            self.before()
        if self.count == self._held:
            wait_for(lambda: self._gate._visitors)
        time.sleep(self.seconds)
        return self._hidden(ids, *args)

    def wait(self, count: int) -> None:
        """Until `count` more steps have begun."""
        target = self.count + count
        wait_for(lambda: self.count >= target)

    def hold(self, count: int) -> None:
        """Until `count` more steps have begun; the last one goes on once someone waits to pause or swap."""
        self._held = self.count + count
        wait_for(lambda: self.count == self._held)


@pytest.fixture
def watch() -> type[Steps]:
    return Steps


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "stuck"
        time.sleep(0.001)


@pytest.fixture(name="wait_for")
def _wait_for() -> Callable[[Callable[[], Any]], None]:
    return wait_for


class Call(threading.Thread):
    """A call in a thread of its own; `get` gives its result or raises its error."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._function, self._result, self._error = functools.partial(function, *args, **kwargs), None, None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def get(self, timeout: float = PATIENCE) -> Any:
        self.join(timeout)
        assert not self.is_alive(), "stuck"
        if self._error is not None:
            raise self._error
        return self._result


@pytest.fixture
def call() -> type[Call]:
    return Call


def check_all_pages_are_back(engine: Engine) -> None:
    """No request is left, and every page can be handed out, also once the prefix cache is empty."""
    scheduler, pool = engine.rollouts.scheduler, engine.rollouts.scheduler.pool
    assert (list(scheduler.waiting), scheduler.running, engine.info()["requests"]) == ([], [], 0)
    assert pool.num_available == pool.num_pages - 1
    pool.forget_prefixes()
    assert (pool.num_available, pool.num_cached) == (pool.num_pages - 1, 0)


@pytest.fixture
def all_pages_are_back() -> Callable[[Engine], None]:
    return check_all_pages_are_back


@torch.no_grad()
def follow(
    models: dict[str, PreTrainedModel], out: Completion, *, recompute: bool = False, tolerance: float = 1e-4
) -> None:
    """A greedy completion is transformers' own, token by token, each from the weights that its span names.

    The reference keeps its past keys and values when the weights change, or (`recompute`) computes all anew.
    """
    tokens = out.prompt_token_ids + out.token_ids
    check_spans(out)
    assert out.logprobs is not None
    past, known, at = DynamicCache(), 0, len(out.prompt_token_ids)
    for index, span in enumerate(out.weight_versions):
        if index and recompute:
            past, known = DynamicCache(), 0
        for _ in range(span.start, span.end):
            inputs = torch.tensor([tokens[known:at]])
            logits = models[span.version](inputs, past_key_values=past, use_cache=True).logits[0, -1]
            scores = logits.log_softmax(-1)
            new = at - len(out.prompt_token_ids)
            assert logits.max() - logits[tokens[at]] <= tolerance, f"token {new} of {out.request_id}"
            assert abs(scores[tokens[at]] - out.logprobs[new]) <= tolerance, f"log-prob {new} of {out.request_id}"
            known, at = at, at + 1


@pytest.fixture(name="follow")
def _follow() -> Callable[..., None]:
    return follow


def check_spans(out: Completion) -> None:
    """They cover [0, len) without gaps."""
    edges = [0, *(span.end for span in out.weight_versions)]
    assert [span.start for span in out.weight_versions] == edges[:-1]
    assert out.logprobs is not None
    assert edges[-1] == len(out.token_ids) == len(out.logprobs)
    assert all(span.start < span.end for span in out.weight_versions)


@pytest.fixture
def make_prompts() -> Callable[..., list[list[int]]]:
    """`make_prompts([5, 20])`: random prompts of these lengths."""

    def make(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(0, 200, (length,), generator=generator).tolist() for length in lengths]

    return make
