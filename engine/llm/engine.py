"""`LanguageEngine`: generate and score tokens, pause, and what `Engine` does with weights."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ...quant import UnsupportedError
from ..checkpoint import Checkpoint
from ..completions import Limits, RequestMaker, each_params, group
from ..config import DIFFUSION_SETTINGS, EngineConfig, SamplingParams, check_unchanged
from ..engine import Engine, SleepTag
from ..env import read_toggles
from ..errors import PausedError, PoisonedError, RequestError
from ..kernel_names import read_kernel_names
from ..prewarm import powers_of_two
from ..progress import show_progress
from ..prompts import Prompts, encode_prompts
from ..schemes import SchemeResolver
from ..start_memory import naming_weight_memory
from ..step_gate import StepGate
from ..streaming import stream
from ..sync_plan import make_sync_plan
from ..types import Completion, StreamChunk
from .attention import WholeSequences
from .decoder import Decoder
from .forward import takes_fixed_attention
from .kv_room import num_pages
from .layers.attention import KVScales
from .models import find_family
from .page_pool import PAGE_SIZE
from .parts import Parts
from .request import Request
from .rollouts import PauseMode, Rollouts


class LanguageEngine(Engine):
    """An engine that serves a causal language model: a folder in Hugging Face layout, or a hub id."""

    def __init__(self, path: str | Path, config: EngineConfig | None = None) -> None:
        super().__init__(path, config)
        _check_language(self.config)
        toggles = read_toggles()
        self.checkpoint = checkpoint = Checkpoint(path)
        family = find_family(checkpoint.architectures)
        capability = self._find_device()
        resolver = SchemeResolver(self.config, checkpoint.quant_plan(), checkpoint.tensor_names, toggles)
        names = read_kernel_names(self.config, toggles)
        parts = Parts(resolver, capability, getattr(torch, self.config.dtype), names)
        self._decoder_config = checkpoint.read_config(family)
        with naming_weight_memory(self.config.quant):
            self.model = Decoder(self._decoder_config, parts, self._kv_scales(resolver.plan.kv_cache))
        takes_fixed_attention(self.model, self.config)  # before weights are read: it may not be possible
        warnings = resolver.finish()
        self.tokenizer = checkpoint.tokenizer()
        self.device = self.model.device
        plan = make_sync_plan(self.model, resolver.plan.kv_cache)
        self._load(plan, checkpoint.source, warnings, powers_of_two(self.config.max_step_tokens))
        pages = num_pages(self.model, self.config, plan.slots)
        self.rollouts = Rollouts(self.model, self._policy, pages, self.config)
        self._policy.commit_gate = self.rollouts.visit
        self._policy.on_flip.append(self.rollouts.weights_changed)
        self._warn_of_shortage()
        limits = Limits(self._decoder_config.vocab_size, self._decoder_config.max_position, (pages - 1) * PAGE_SIZE)
        self._maker = RequestMaker(self.tokenizer, checkpoint.eos_token_ids(), limits, self.config.seed << 32)

    def _kv_scales(self, stored: str | None) -> KVScales | None:
        """Of an FP8 KV cache, if there is to be one; `stored`: the format of the checkpoint's."""
        if self.config.kv_cache_dtype == "fp8" and self._decoder_config.attention.latent is not None:
            raise UnsupportedError("kv_cache_dtype='fp8'", ["keys and values of latent attention are kept in `dtype`"])
        if stored is not None:
            return "stored"
        return "unit" if self.config.kv_cache_dtype == "fp8" else None

    # rollouts

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_routed_experts: bool = False,
        request_id: str | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Sample `params.n` completions of every prompt, prompt-major.

        `params`: for all prompts, or one for each. `request_id`: what `abort` knows the call by. `progress` shows a
        bar on stderr. Requests of several threads are decoded together. While the engine is paused this waits for
        `resume`.
        """
        rollouts = self._opened()
        requests = self._requests(prompts, params, request_id, routed=return_routed_experts)
        if rollouts.paused and rollouts.pausing_thread == threading.get_ident():
            raise PausedError("this thread has paused the engine and would wait for itself: call resume() first")
        with show_progress(requests, shown=progress) as on_step:
            rollouts.run(group(requests), on_step)
        return [self._maker.complete(request) for request in requests]

    async def agenerate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_routed_experts: bool = False,
        request_id: str | None = None,
    ) -> list[Completion]:
        """`generate` for an event loop; cancelling the task aborts the requests."""
        rollouts = self._opened()
        requests = self._requests(prompts, params, request_id, routed=return_routed_experts)
        done: list[Completion | None] = [None] * len(requests)
        async for chunk in stream(rollouts, self._maker, requests, only_ends=True):
            if chunk.completion is not None:
                done[chunk.index] = chunk.completion
        return [completion for completion in done if completion is not None]

    def stream(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_routed_experts: bool = False,
        request_id: str | None = None,
    ) -> AsyncGenerator[StreamChunk, None]:
        """`async for chunk in engine.stream(...)`: what each step adds; breaking out aborts the rest."""
        rollouts = self._opened()
        requests = self._requests(prompts, params, request_id, routed=return_routed_experts, streamed=True)
        return stream(rollouts, self._maker, requests)

    def abort(self, request_id: str | None = None) -> None:
        """End the requests of this id (or one of its completions, "id-0"), or all; they return what they have."""

        def chosen(request: Request) -> bool:
            return request_id is None or request_id in (request.id, request.id.rpartition("-")[0])

        self.rollouts.abort(chosen)

    def _requests(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None,
        request_id: str | None,
        *,
        routed: bool,
        streamed: bool = False,
    ) -> list[Request]:
        self._check_awake()
        config = self._decoder_config
        encoded = encode_prompts(prompts, self.tokenizer, config.vocab_size, config.max_position)
        chosen = each_params(params, len(encoded))
        return self._maker.make(encoded, chosen, request_id, routed=routed, streamed=streamed)

    def score(self, prompts: Prompts, *, temperature: float = 1.0) -> list[Tensor]:
        """Log-probs float32 [len(prompt) - 1] of each token of each prompt, given the tokens before it."""
        if not temperature > 0:
            raise RequestError(f"scores need a temperature above 0, got {temperature}")
        scores = []
        for ids, logits in self._each_logits(prompts):
            logprobs = (logits[:-1] / temperature).log_softmax(-1)
            scores.append(logprobs.gather(-1, torch.tensor(ids[1:], device=logits.device)[:, None])[:, 0])
        return scores

    def logits(self, prompts: Prompts) -> list[Tensor]:
        """Logits float32 [len(prompt), vocab_size] after every token of each prompt."""
        return [logits for _, logits in self._each_logits(prompts)]

    def _each_logits(self, prompts: Prompts) -> Iterator[tuple[list[int], Tensor]]:
        """(token ids, logits) prompt by prompt: logits over a vocabulary are too big to hold for a batch."""
        config = self._decoder_config
        for ids in encode_prompts(prompts, self.tokenizer, config.vocab_size, config.max_position + 1):
            rollouts = self._opened()
            with rollouts.computing(), torch.no_grad():
                self._check_open()  # it may have been closed, or put to sleep, since the prompt before
                self._policy.check_servable()
                model = self.model
                at = torch.arange(len(ids), device=model.device)
                hidden = model.hidden(at.new_tensor(ids), at, WholeSequences([len(ids)]))
                logits = model.logits(hidden).float()
            rollouts.steps.stream.hand_over(logits)
            yield ids, logits

    # pausing

    def pause(self, mode: PauseMode = "keep") -> None:
        """Stop generating between two steps, until `resume`; requests that come meanwhile wait.

        "keep": running requests keep their keys and values; "retract": they give them up and are computed again;
        "abort": all requests end now and return what they have.
        """
        if mode not in get_args(PauseMode):
            raise RequestError(f"pause mode {mode!r}; possible: {', '.join(get_args(PauseMode))}")
        self._check_open()
        self.rollouts.pause(mode)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._check_open()
        self.rollouts.resume()

    def sleep(self, tags: Sequence[SleepTag] = get_args(SleepTag)) -> None:
        super().sleep(tags)
        self.rollouts.forget_graphs()  # before anything wakes: what they read has gone

    def _free_cache(self) -> None:
        self.rollouts.free_cache()

    def _allocate_cache(self) -> None:
        self.rollouts.allocate_cache()

    # life

    def _more_info(self) -> dict[str, Any]:
        return {
            "architectures": self.checkpoint.architectures,
            "vocab_size": self._decoder_config.vocab_size,
            "max_position": self._decoder_config.max_position,
            **self.rollouts.info(),
        }

    def _asleep_tags(self) -> list[SleepTag]:
        return [*(["kv_cache"] if self.rollouts.cache.asleep else []), *super()._asleep_tags()]

    def _stop(self) -> StepGate:
        self.rollouts.close()
        return self.rollouts.gate

    def _drop(self) -> None:
        del self.model, self.rollouts

    def _opened(self) -> Rollouts:
        self._check_open()
        return self.rollouts

    def _check_awake(self) -> None:
        self._check_open()
        self.rollouts.cache.check_awake()
        with suppress(PoisonedError):  # a swap under way looks the same: the step, after it, tells
            self._policy.check_servable()


def _check_language(config: EngineConfig) -> None:
    check_unchanged(config, DIFFUSION_SETTINGS, "diffusion transformers")
    if config.attention == "fp8":
        raise UnsupportedError("attention='fp8'", ["it is for diffusion transformers; here: auto, torch, flashinfer"])
