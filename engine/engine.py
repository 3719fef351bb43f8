"""`Engine`: open a checkpoint, generate, update the weights, close."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import msgspec
import torch
from torch import Tensor

from ..quant import UnsupportedError, clipping_shares, find_capability
from ..weight_sync import Policy, Source, UpdateReport, WeightSession
from .checkpoint import Checkpoint
from .completions import Limits, RequestMaker, each_params, group
from .config import EngineConfig, SamplingParams
from .env import read_toggles
from .errors import ClosedError, PausedError, PoisonedError, RequestError
from .llm.attention import WholeSequences
from .llm.decoder import Decoder
from .llm.kv_cache import KVCache
from .llm.models import find_family
from .llm.page_pool import PAGE_SIZE
from .llm.parts import Parts
from .llm.request import Request
from .llm.rollouts import PauseMode, Rollouts
from .progress import show_progress
from .prompts import Prompts, encode_prompts
from .schemes import SchemeResolver
from .streaming import stream
from .sync_plan import make_sync_plan
from .types import Completion, StreamChunk

SleepTag = Literal["weights", "kv_cache"]
KV_CACHE_BYTES = 2 << 30  # the most that the KV cache takes unasked


class Engine:
    """A rollout engine for one policy: quantized weights that a trainer swaps, and generation from them.

    `path` is a folder in Hugging Face layout (BF16 or ModelOpt-quantized) or a hub id.
    """

    def __init__(self, path: str | Path, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        _check_supported(self.config)
        toggles = read_toggles()
        self.checkpoint = checkpoint = Checkpoint(path)
        family = find_family(checkpoint.architectures)
        capability = find_capability(self.config.device)
        resolver = SchemeResolver(self.config, checkpoint.quant_plan(), checkpoint.tensor_names, toggles)
        parts = Parts(
            resolver,
            capability,
            getattr(torch, self.config.dtype),
            toggles.linear_kernel or self.config.linear_kernel,
            toggles.moe_runner or self.config.moe_runner,
        )
        self._decoder_config = checkpoint.read_config(family)
        self.model = Decoder(self._decoder_config, parts, resolver.plan.kv_cache)
        warnings = resolver.finish()
        self.tokenizer = checkpoint.tokenizer()
        self._policy = Policy(make_sync_plan(self.model, resolver.plan.kv_cache), self.config.swap, self.config.master)
        report = self._policy.update(checkpoint.source, None)
        self.load_report = msgspec.structs.replace(report, warnings=(*warnings, *report.warnings))
        num_pages = _num_pages(self.model, self.config)
        self.rollouts = Rollouts(self.model, self._policy, num_pages, self.config)
        self._policy.commit_gate = self.rollouts.gate.visit
        self._policy.on_flip.append(self.rollouts.weights_changed)
        limits = Limits(self._decoder_config.vocab_size, self._decoder_config.max_position, (num_pages - 1) * PAGE_SIZE)
        self._maker = RequestMaker(self.tokenizer, checkpoint.eos_token_ids(), limits, self.config.seed << 32)

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
            with self._opened().gate.visit(), torch.no_grad():
                self._check_open()  # it may have been closed, or put to sleep, since the prompt before
                self._policy.check_servable()
                model = self.model
                at = torch.arange(len(ids), device=model.device)
                hidden = model.hidden(at.new_tensor(ids), at, WholeSequences([len(ids)]))
                logits = model.logits(hidden)
            yield ids, logits

    # weights

    @property
    def weight_version(self) -> str | None:
        """The policy version being served; None while the engine is poisoned, and from sleep to the next full swap."""
        return self._policy.version

    def update_weights(self, source: Source, version: str | None = None) -> UpdateReport:
        """Swap in the weights of a dict, an iterator of (name, tensor) or a safetensors folder; all or nothing."""
        self._check_open()
        return self._policy.update(source, version)

    def weight_session(self, version: str | None = None) -> WeightSession:
        """The same, in buckets: `with engine.weight_session() as session: session.load(bucket)`."""
        self._check_open()
        return self._policy.begin(version)

    def digest(self, source: Source | None = None) -> str:
        """SHA-256 hex over all stored values being served (weights and scales), the same for every kernel.

        With `source`: the digest that a swap to it would give, for a trainer that wants to know before or after.
        """
        self._check_open()
        return self._policy.digest() if source is None else self._policy.digest_of(source)

    # pausing and sleeping

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
        """Give memory back: of "weights" (scales that no trainer sends are kept), of the "kv_cache", or of both.

        Running requests wait; without the KV cache they are computed again. Sleeping twice changes nothing.
        """
        self._check_tags(tags)
        if "weights" in tags:
            self._policy.sleep()
        if "kv_cache" in tags:
            self.rollouts.free_cache()

    def wake(self, tags: Sequence[SleepTag] = get_args(SleepTag)) -> UpdateReport | None:
        """Take the memory again.

        Weights come back empty, and nothing is generated until a full `update_weights`; with a kept master
        (`EngineConfig(master="host")`) they are restored, and the report of that swap comes back.
        """
        self._check_tags(tags)
        if "kv_cache" in tags:
            self.rollouts.allocate_cache()
        return self._policy.wake() if "weights" in tags else None

    def _check_tags(self, tags: Sequence[SleepTag]) -> None:
        self._check_open()
        wrong = sorted(set(tags) - set(get_args(SleepTag)))
        if wrong:
            raise RequestError(f"tags {wrong}; possible: {', '.join(get_args(SleepTag))}")

    # what a kept master gives (EngineConfig(master="host"))

    def update_lora(
        self, source: Source, alpha: float | None = None, rank: int | None = None, version: str | None = None
    ) -> UpdateReport:
        """Merge an adapter into the base weights, in place of the adapter before, and requantize; all or nothing.

        `source`: a dict or iterator in PEFT's names (`...q_proj.lora_A.weight` [rank, in], `lora_B` [out, rank]), or
        PEFT's folder, whose adapter_config.json says `alpha` and `rank` where these are None.
        """
        self._check_open()
        return self._policy.update_lora(source, alpha, rank, version)

    def remove_lora(self, version: str | None = None) -> UpdateReport:
        """Take the adapter off: the bytes are those of the base weights again."""
        self._check_open()
        return self._policy.remove_lora(version)

    def quantization_error(self) -> dict[str, float]:
        """Layer -> ||dequantize(quantize(W)) - W|| / ||W|| (Frobenius), W the BF16 weights that are served.

        Layers that came quantized have no BF16 to compare with and are not listed, nor are unquantized ones.
        """
        self._check_open()
        return self._policy.quantization_error()

    # life

    def info(self) -> dict[str, Any]:
        """What the engine is, holds and serves."""
        self._check_open()
        slots = self.model.slots
        return {
            "path": str(self.checkpoint.folder),
            "architectures": self.checkpoint.architectures,
            "weight_version": self.weight_version,
            "poisoned": self._policy.poisoned,
            "swap": self.config.swap,
            "dtype": self.config.dtype,
            "vocab_size": self._decoder_config.vocab_size,
            "max_position": self._decoder_config.max_position,
            "device": str(self.model.device),
            "quant": sorted({slot.scheme.name for slot in slots}),
            "activation": sorted({slot.scheme.activation for slot in slots} - {"none"}),
            "clipping": clipping_shares(slots),
            "weight_bytes": sum(slot.num_bytes for slot in slots),
            "asleep": self._asleep_tags(),
            **self.rollouts.info(),
            "master_bytes": self._policy.master_bytes,
            "warnings": list(self.load_report.warnings),
        }

    def _asleep_tags(self) -> list[SleepTag]:
        asleep: dict[SleepTag, bool] = {
            "kv_cache": self.rollouts.cache.asleep,
            "weights": self._policy.state == "asleep",
        }
        return [tag for tag, is_asleep in asleep.items() if is_asleep]

    def close(self) -> None:
        """Free the weights; the engine cannot be used afterwards."""
        if not self._policy.closed:
            self.rollouts.close()
            with self.rollouts.gate.visit():  # a score under way has ended
                self._policy.close()
            del self.model, self.rollouts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._policy.closed:
            raise ClosedError("this engine has been closed; open a new one")

    def _opened(self) -> Rollouts:
        self._check_open()
        return self.rollouts

    def _check_awake(self) -> None:
        self._check_open()
        self.rollouts.cache.check_awake()
        with suppress(PoisonedError):  # a swap under way looks the same: the step, after it, tells
            self._policy.check_servable()


def _check_supported(config: EngineConfig) -> None:
    if config.tp != 1 or config.ep != 1:
        raise UnsupportedError(f"tp={config.tp}, ep={config.ep}", ["only tp=1 and ep=1 are built"])


def _num_pages(model: Decoder, config: EngineConfig) -> int:
    """Pages of the KV cache, and one that pads."""
    tokens = config.kv_cache_tokens
    if tokens is None:
        wanted = config.max_batch_size * model.config.max_position
        per_token = KVCache.bytes_per_token(model.attention_specs, model.routing, model.dtype)
        tokens = min(wanted, KV_CACHE_BYTES // per_token)
    return -(-tokens // PAGE_SIZE) + 1
