"""`DiffusionEngine`: rollouts of a diffusion transformer, and what `Engine` does with weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from ...quant import find_capability
from ...weight_sync import Source, SyncPlan, UpdateReport, WeightSession
from ..config import EngineConfig
from ..engine import Engine
from ..env import read_toggles
from ..errors import ConfigError, RequestError
from ..schemes import SchemeResolver
from ..step_gate import StepGate
from .checkpoint import DiffusionCheckpoint
from .families import Embeds, Family, default_keep, find_family
from .params import DiffusionParams
from .rollouts import Call, DiffusionRollouts, Wanted
from .sample import DiffusionSample, Exploration, Seeds
from .transformer import PrecisionSwitch, Transformer

Reward = Callable[[Sequence[DiffusionSample]], Sequence[float]]
SEED_STRIDE = 1 << 40  # calls that name no seed are so far apart


class DiffusionEngine(Engine):
    """An engine that serves a diffusion transformer: a folder of a diffusers pipeline, of a transformer alone, a file
    of transformer weights, or a hub id."""

    def __init__(self, path: str | Path, config: EngineConfig | None = None) -> None:
        super().__init__(path, config)
        toggles = read_toggles()
        self.checkpoint = checkpoint = DiffusionCheckpoint(path, self.config)
        capability = find_capability(self.config.device)
        self.device, self.dtype = capability.device, getattr(torch, self.config.dtype)
        self._switch = PrecisionSwitch()
        self.transformers: dict[str, Transformer] = {}
        warnings: list[str] = []
        for name, stored in checkpoint.transformers.items():
            keep = default_keep(str(stored.config.get("_class_name")))
            resolver = SchemeResolver(self.config, stored.plan, stored.tensor_names, toggles, keep)
            self.transformers[name] = Transformer(
                name,
                stored.config,
                resolver,
                self._switch,
                capability=capability,
                dtype=self.dtype,
                linear_kernel=toggles.linear_kernel or self.config.linear_kernel,
                dual=self.config.dual is not None,
            )
            warnings += resolver.finish()
        self._load(self._sync_plan(), self._all_tensors(), warnings)
        self._pipeline: Any = None
        self._rollouts: DiffusionRollouts | None = None
        self._calls = itertools.count()
        self._gate = StepGate()
        self._policy.commit_gate = self._gate.visit

    def _sync_plan(self) -> SyncPlan:
        slots = [slot for transformer in self.transformers.values() for slot in transformer.slots]
        twins = {slot: twin for transformer in self.transformers.values() for slot, twin in transformer.twins.items()}
        return SyncPlan(slots, twins=twins, components=tuple(self.transformers))

    def _all_tensors(self) -> Source:
        stored = self.checkpoint.transformers
        return ((f"{component}.{name}", value) for component in stored for name, value in stored[component].source)

    # rollouts

    @property
    def transformer(self) -> Any:
        """The quantized diffusers module itself, called as diffusers calls it; `transformers` has the second one."""
        self._check_open()
        return next(iter(self.transformers.values())).module

    @property
    def pipeline(self) -> Any:
        """diffusers' pipeline with its text encoders, VAE and scheduler, around our transformers; None without one."""
        self._check_open()
        if self._pipeline is None and self.checkpoint.folder is not None:
            modules = {name: transformer.module for name, transformer in self.transformers.items()}
            self._pipeline = self.checkpoint.pipeline(torch_dtype=self.dtype, **modules)
        return self._pipeline

    @property
    def rollouts(self) -> DiffusionRollouts:
        """The loop, made when the first rollout asks for it: a model without a family can be swapped and called."""
        if self._rollouts is None:
            first = next(iter(self.transformers.values()))
            family_type = find_family(str(first.config.get("_class_name")))
            index = self.checkpoint.model_index
            boundary = index.get("boundary_ratio")
            self._rollouts = DiffusionRollouts(
                self.transformers,
                family_type(first.config, self._vae_scale()),
                self._scheduler(family_type),
                self._policy,
                self._gate,
                max_batch=self.config.max_denoise_batch,
                boundary=None if boundary is None else boundary * 1000,
            )
        return self._rollouts

    def _vae_scale(self) -> int:
        """Pixels a latent pixel; 8 where there is no VAE to tell."""
        if self.pipeline is None:
            return 8
        scale = getattr(self.pipeline, "vae_scale_factor", None)
        return self.pipeline.vae_scale_factor_spatial if scale is None else scale

    def _scheduler(self, family: type[Family]) -> Any:
        if self.pipeline is not None:
            return self.pipeline.scheduler
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**family.SCHEDULER)

    def generate(
        self, prompts: str | Embeds | Sequence[str] | Sequence[Embeds], params: DiffusionParams | None = None
    ) -> list[DiffusionSample]:
        """Draw `params.n` samples of every prompt, prompt-major; prompts as text need the pipeline's encoders."""
        self._check_open()
        chosen: DiffusionParams = DiffusionParams() if params is None else params
        embeds = self._embeds(prompts, chosen)
        call = self._call(chosen, embeds)
        return self._run(call, self._wanted(call.params, embeds))

    def _wanted(self, params: DiffusionParams, embeds: Sequence[Embeds]) -> list[Wanted]:
        """`params.n` samples of every prompt, with seeds of their own."""
        base = next(self._calls) * SEED_STRIDE + (self.config.seed << 24)
        init = base if params.init_seed is None else params.init_seed
        step = base if params.step_seed is None else params.step_seed
        places = [(p, i) for p in range(len(embeds)) for i in range(params.n)]
        return [
            Wanted(
                p,
                embeds[p],
                Seeds(
                    init + (p if params.init_noise == "shared" else p * params.n + i),
                    step + (p if params.step_noise == "shared" else p * params.n + i),
                ),
            )
            for p, i in places
        ]

    def replay(
        self,
        samples: Sequence[DiffusionSample],
        precision: str | None = None,
        want: Sequence[Any] | None = None,
    ) -> list[DiffusionSample]:
        """The same samples again, from the same noise, with today's weights: in `precision`, or in their own."""
        self._check_open()
        done: list[DiffusionSample] = []
        for params, group in itertools.groupby(samples, key=lambda sample: sample.params):
            members = list(group)
            changes = {"precision": precision, "want": want}
            params = replace(params, **{key: value for key, value in changes.items() if value is not None})
            call = self._call(params, [member.embeds for member in members])
            done += self._run(call, [Wanted(m.prompt_index, m.embeds, m.seeds) for m in members])
        return done

    def explore(
        self,
        prompts: str | Embeds | Sequence[str] | Sequence[Embeds],
        *,
        reward: Reward,
        pool: int = 96,
        keep: tuple[int, int] = (12, 12),
        params: DiffusionParams | None = None,
        precision: str = "bf16",
    ) -> list[Exploration]:
        """Rank a pool of quantized samples of every prompt by `reward`, and compute the `keep` best and worst again in
        `precision` from the same noise (Sol-RL, arXiv:2604.06916).

        `reward` gets all samples of one prompt and returns a number for each.
        """
        best, worst = keep
        if best < 0 or worst < 0 or not 0 < best + worst <= pool:
            raise RequestError(f"keep={keep} of a pool of {pool}: numbers of best and worst, at most the pool in all")
        call_params = replace(params or DiffusionParams(), n=pool)
        samples = self.generate(prompts, call_params)
        groups = [samples[start : start + pool] for start in range(0, len(samples), pool)]
        return [self._explore_group(group, reward, best, worst, precision) for group in groups]

    def _explore_group(
        self, group: Sequence[DiffusionSample], reward: Reward, best: int, worst: int, precision: str
    ) -> Exploration:
        rewards = torch.as_tensor(reward(group), dtype=torch.float32)
        if rewards.shape != (len(group),):
            raise RequestError(f"reward returned {list(rewards.shape)} numbers for {len(group)} samples")
        order = rewards.argsort(descending=True, stable=True).tolist()
        top, bottom = order[:best], order[::-1][:worst]
        kept = self.replay([group[i] for i in (*top, *bottom)], precision)
        return Exploration(rewards=rewards, best=top, worst=bottom, samples=kept)

    def _run(self, call: Call, wanted: Sequence[Wanted]) -> list[DiffusionSample]:
        samples = self.rollouts.run(call, wanted)
        if "image" not in call.params.want:
            return samples
        step = self.config.max_denoise_batch
        parts = [samples[start : start + step] for start in range(0, len(samples), step)]
        images = [image for part in parts for image in self._images(call, part)]
        return [replace(sample, image=image) for sample, image in zip(samples, images, strict=True)]

    @torch.no_grad()
    def _images(self, call: Call, samples: Sequence[DiffusionSample]) -> Tensor:
        latents = torch.stack([sample.latents[-1] for sample in samples])
        return self.rollouts.family.decode(self.pipeline, latents, call.size)

    def _call(self, params: DiffusionParams, embeds: Sequence[Embeds]) -> Call:
        """Check everything before anything is computed."""
        family = self.rollouts.family
        if "image" in params.want and (self.pipeline is None or self.pipeline.vae is None):
            raise RequestError(
                'want "image" needs a VAE, and a transformer alone has none: open the pipeline\'s folder'
            )
        if "image" in params.want and not {"latents", "latents:final"} & set(params.want):
            params = replace(params, want=(*params.want, "latents:final"))
        if family.POOLED and any(one.pooled is None for one in embeds):
            raise RequestError("this model reads a pooled embedding, too: give Embeds(prompt, pooled)")
        cfg = None
        if _wants_cfg(params):
            scale = params.true_cfg_scale or 1.0
            cfg = scale, params.true_cfg_scale_2 or scale
            if any(one.negative is None for one in embeds):
                raise RequestError(
                    "true_cfg_scale needs negative embeds: give Embeds(prompt, ..., negative=Embeds(...))"
                )
        return self.rollouts.plan(params, family.guidance(params), cfg)

    def _embeds(
        self, prompts: str | Embeds | Sequence[str] | Sequence[Embeds], params: DiffusionParams
    ) -> list[Embeds]:
        """Every prompt encoded, in the engine's dtype and on its device, shared by its group."""
        listed = [prompts] if isinstance(prompts, str | Embeds) else list(prompts)
        if not listed:
            raise RequestError("no prompts")
        texts = [one for one in listed if isinstance(one, str)]
        encoded = [one for one in listed if isinstance(one, Embeds)]
        if len(encoded) == len(listed):
            return [self._placed(one) for one in encoded]
        if len(texts) != len(listed):
            raise RequestError("prompts are all text, or all Embeds")
        return [self._placed(one) for one in self._encode(texts, params)]

    def _encode(self, texts: Sequence[str], params: DiffusionParams) -> list[Embeds]:
        if self.pipeline is None:
            raise RequestError("a transformer alone has no text encoder: give Embeds, or open the pipeline's folder")
        family = self.rollouts.family
        with torch.no_grad():
            embeds = family.encode(self.pipeline, texts)
            if not _wants_cfg(params):
                return embeds
            negative = family.encode(self.pipeline, [params.negative_prompt or ""])[0]
        return [replace(one, negative=negative) for one in embeds]

    def _placed(self, embeds: Embeds) -> Embeds:
        parts = {
            "prompt": embeds.prompt.to(self.device, self.dtype),
            "pooled": None if embeds.pooled is None else embeds.pooled.to(self.device, self.dtype),
            "mask": None if embeds.mask is None else embeds.mask.to(self.device),
            "negative": None if embeds.negative is None else self._placed(embeds.negative),
        }
        return Embeds(**parts)

    def pause(self) -> None:
        """Stop between two batches of samples, until `resume`; returns once none is under way."""
        self._check_open()
        self.rollouts.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._check_open()
        self.rollouts.resume()

    # weights, by component

    def update_weights(self, source: Source, version: str | None = None, module: str | None = None) -> UpdateReport:
        """Swap in the weights of a dict, an iterator of (name, tensor) or a safetensors folder; all or nothing.

        Names are diffusers', of `module` ("transformer", "transformer_2"). None: of the only one there is; where there
        are two, every name begins with its module.
        """
        self._check_open()
        return self._policy.update(self._opened(source, module), version, self._prefix(module))

    def weight_session(self, version: str | None = None, module: str | None = None) -> WeightSession:
        """The same, in buckets: `with engine.weight_session() as session: session.load(bucket)`."""
        self._check_open()
        return self._policy.begin(version, self._prefix(module))

    def digest(self, source: Source | None = None, module: str | None = None) -> str:
        """As `Engine.digest`; `source` names the tensors of `module`."""
        self._check_open()
        if source is None:
            return self._policy.digest()
        return self._policy.digest_of(self._opened(source, module), self._prefix(module))

    def update_lora(
        self,
        source: Source,
        alpha: float | None = None,
        rank: int | None = None,
        version: str | None = None,
        module: str | None = None,
    ) -> UpdateReport:
        """As `Engine.update_lora`, for one module: the other one keeps its adapter."""
        self._check_open()
        return self._policy.update_lora(source, alpha, rank, version, self._prefix(module))

    def remove_lora(self, version: str | None = None, module: str | None = None) -> UpdateReport:
        """Take the adapter of `module` off: the bytes are those of the base weights again."""
        self._check_open()
        return self._policy.remove_lora(version, self._prefix(module))

    def _opened(self, source: Source, module: str | None) -> Source:
        """The stored tensors of a path, whatever its names and layout; other sources as they are."""
        prefix = self._prefix(module)
        if not isinstance(source, str | Path):
            return source
        return self.checkpoint.open_weights(source, prefix.removesuffix("."), self.config.layout)

    def _prefix(self, module: str | None) -> str:
        if module is None:
            return f"{next(iter(self.transformers))}." if len(self.transformers) == 1 else ""
        if module not in self.transformers:
            raise ConfigError(f"no module {module!r} here; possible: {', '.join(self.transformers)}")
        return f"{module}."

    # life

    def _more_info(self) -> dict[str, Any]:
        return {
            "transformers": {name: one.config.get("_class_name") for name, one in self.transformers.items()},
            "dual": self.config.dual,
            "max_denoise_batch": self.config.max_denoise_batch,
        }

    def _stop(self) -> StepGate:
        if self._rollouts is not None:
            self._rollouts.close()
        return self._gate

    def _drop(self) -> None:
        self.transformers.clear()
        self._pipeline = self._rollouts = None


def _wants_cfg(params: DiffusionParams) -> bool:
    return params.true_cfg_scale is not None and params.true_cfg_scale != 1
