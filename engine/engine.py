"""`Engine`: open a checkpoint, generate, update the weights, close."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import torch
from torch import Tensor

from ..quant import UnsupportedError, clipping_shares, find_capability
from ..weight_sync import Policy, Source, SyncPlan, UpdateReport, WeightSession
from .checkpoint import Checkpoint
from .config import EngineConfig, SamplingParams
from .env import read_toggles
from .errors import ClosedError, RequestError
from .llm.decoder import Decoder, Parts
from .llm.generation import Draft, generate, make_draft, prompt_logits
from .llm.models import find_family
from .prompts import Prompts, encode_prompts
from .schemes import SchemeResolver
from .types import Completion, VersionSpan


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
        self._eos = checkpoint.eos_token_ids()
        self._seeds = itertools.count(self.config.seed << 32)
        self._policy = Policy(_sync_plan(self.model, resolver.plan.kv_cache), self.config.swap)
        report = self._policy.update(checkpoint.source, None)
        self.load_report = msgspec.structs.replace(report, warnings=(*warnings, *report.warnings))

    # rollouts

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | None = None,
        *,
        return_routed_experts: bool = False,
    ) -> list[Completion]:
        """Sample `params.n` completions of every prompt, prompt-major."""
        self._check_servable()
        chosen: SamplingParams = params or SamplingParams()
        limit = self._decoder_config.max_position
        encoded = encode_prompts(prompts, self.tokenizer, self._decoder_config.vocab_size, limit)
        drafts = [
            make_draft(prompt, next(self._seeds) if chosen.seed is None else chosen.seed + i, chosen, limit)
            for prompt in encoded
            for i in range(chosen.n)
        ]
        stop = frozenset(chosen.stop) | (frozenset() if chosen.ignore_eos else self._eos)
        for batch in _batches(drafts, self.config.max_batch_size):
            generate(self.model, batch, chosen, stop, capture_routing=return_routed_experts)
        return [self._completion(draft, chosen, return_routed_experts) for draft in drafts]

    def score(self, prompts: Prompts, *, temperature: float = 1.0) -> list[Tensor]:
        """Log-probs float32 [len(prompt) - 1] of each token of each prompt, given the tokens before it."""
        if not temperature > 0:
            raise RequestError(f"scores need a temperature above 0, got {temperature}")
        self._check_servable()
        scores = []
        for ids, logits in self._each_logits(prompts):
            logprobs = (logits[:-1] / temperature).log_softmax(-1)
            scores.append(logprobs.gather(-1, torch.tensor(ids[1:], device=logits.device)[:, None])[:, 0])
        return scores

    def logits(self, prompts: Prompts) -> list[Tensor]:
        """Logits float32 [len(prompt), vocab_size] after every token of each prompt."""
        self._check_servable()
        return [logits for _, logits in self._each_logits(prompts)]

    def _each_logits(self, prompts: Prompts) -> Iterator[tuple[list[int], Tensor]]:
        """(token ids, logits) prompt by prompt: logits over a vocabulary are too big to hold for a batch."""
        config = self._decoder_config
        for ids in encode_prompts(prompts, self.tokenizer, config.vocab_size, config.max_position + 1):
            yield ids, prompt_logits(self.model, [ids])[0]

    # weights

    @property
    def weight_version(self) -> str | None:
        """The policy version being served; None while the engine is poisoned."""
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
            "device": str(self.model.device),
            "quant": sorted({slot.scheme.name for slot in slots}),
            "activation": sorted({slot.scheme.activation for slot in slots} - {"none"}),
            "clipping": clipping_shares(slots),
            "weight_bytes": sum(slot.num_bytes for slot in slots),
            "warnings": list(self.load_report.warnings),
        }

    def close(self) -> None:
        """Free the weights; the engine cannot be used afterwards."""
        if not self._policy.closed:
            self._policy.close()
            del self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._policy.closed:
            raise ClosedError("this engine has been closed; open a new one")

    def _check_servable(self) -> None:
        self._check_open()
        self._policy.check_servable()

    def _completion(self, draft: Draft, params: SamplingParams, routed: bool) -> Completion:
        assert draft.finish_reason is not None
        assert self.weight_version is not None
        text = None
        if self.tokenizer is not None:
            text = str(self.tokenizer.decode(draft.token_ids, skip_special_tokens=True))
        return Completion(
            prompt_token_ids=list(draft.prompt),
            token_ids=draft.token_ids,
            text=text,
            finish_reason=draft.finish_reason,
            logprobs=None if params.logprobs is None else torch.tensor(draft.logprobs),
            weight_versions=[VersionSpan(self.weight_version, 0, len(draft.token_ids))],
            routed_experts=torch.cat(draft.routed) if routed and draft.routed else None,
            seed=draft.seed,
        )


def _check_supported(config: EngineConfig) -> None:
    if config.tp != 1 or config.ep != 1:
        raise UnsupportedError(f"tp={config.tp}, ep={config.ep}", ["only tp=1 and ep=1 are built"])


def _sync_plan(model: Decoder, kv_cache: str | None) -> SyncPlan:
    ignored = {"*.rotary_emb.inv_freq": "computed from config.json"}
    if kv_cache is None:
        ignored |= {f"*.{name}": "the KV cache is not quantized" for name in ("k_scale", "v_scale")}
    return SyncPlan(
        model.slots,
        renames=model.config.names.renames,
        ignored=ignored,
        tied={"lm_head.weight": "model.embed_tokens.weight"} if model.config.tied else None,
    )


def _batches(drafts: Sequence[Draft], size: int) -> Iterable[Sequence[Draft]]:
    return (drafts[start : start + size] for start in range(0, len(drafts), size))
