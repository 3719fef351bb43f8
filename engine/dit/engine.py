"""`DiffusionEngine`: rollouts of a diffusion transformer, and what `Engine` does with weights."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from msgspec.structs import asdict, replace
from torch import Tensor, nn

from ...weight_sync import Source, SyncPlan, UpdateReport, WeightSession
from ..config import LANGUAGE_SETTINGS, EngineConfig, check_unchanged
from ..engine import Engine, SleepTag
from ..env import read_toggles
from ..errors import ConfigError, RequestError, UnsupportedError
from ..kernel_names import read_kernel_names
from ..schemes import SchemeResolver
from ..step_gate import StepGate
from .checkpoint import DiffusionCheckpoint
from .families import Family, default_keep, find_family
from .params import DiffusionParams, Precisions, Want
from .progress import show_samples
from .prompts import DiffusionPrompts, check_embeds, embed_prompts, place_embeds
from .ranking import Reward, check_keep, check_versions, extremes, read_rewards
from .rollouts import Call, DiffusionRollouts, Wanted
from .sample import DiffusionSample, Exploration
from .seeds import SeedSource
from .transformer import PrecisionSwitch, Transformer
from .turns import Turns

CHECKED_TOKENS = (1, 4096)  # modulations, and 1024 x 1024 images; other numbers are checked when they first come

log = logging.getLogger("rollmill")


class DiffusionEngine(Engine):
    """An engine that serves a diffusion transformer: a folder of a diffusers pipeline, of a transformer alone, a file
    of transformer weights, or a hub id."""

    def __init__(self, path: str | Path, config: EngineConfig | None = None) -> None:
        super().__init__(path, config)
        _check_diffusion(self.config)
        toggles = read_toggles()
        self.checkpoint = checkpoint = DiffusionCheckpoint(path, self.config)
        capability = self._find_device()
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
                names=read_kernel_names(self.config, toggles),
                dual=self.config.dual is not None,
                fp8_attention=self.config.attention == "fp8",
            )
            warnings += resolver.finish()
        self._load(self._sync_plan(), self._all_tensors(), warnings, CHECKED_TOKENS)
        self._pipeline: Any = None
        self._rollouts: DiffusionRollouts | None = None
        self._made = threading.RLock()  # one pipeline and one loop, whichever thread asks first
        self._seeds = SeedSource(self.config.seed)
        self._turns = Turns(self._policy, self.device)
        for transformer in self.transformers.values():
            transformer.compute_within(self._turns.call)
            if (capability.sm or 0) >= 89 and "triton" in capability.libraries and self.dtype == torch.bfloat16:
                transformer.fuse(graphs=self.config.cuda_graphs)

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
        with self._made:
            self._check_open()
            if self._pipeline is None and self.checkpoint.folder is not None:
                modules = {name: transformer.module for name, transformer in self.transformers.items()}
                self._pipeline = self._place(self.checkpoint.pipeline(torch_dtype=self.dtype, **modules))
            return self._pipeline

    def _place(self, pipeline: Any) -> Any:
        """Encoders and VAE on the engine's device, where the transformers are."""
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and name not in self.transformers:
                part.to(self.device)
        return pipeline

    @property
    def rollouts(self) -> DiffusionRollouts:
        """The loop, made when the first rollout asks for it: a model without a family can be swapped and called."""
        with self._made:
            self._check_open()
            if self._rollouts is None:
                self._rollouts = self._make_rollouts()
            return self._rollouts

    def _make_rollouts(self) -> DiffusionRollouts:
        first = next(iter(self.transformers.values()))
        family_type = find_family(str(first.config.get("_class_name")))
        index = self.checkpoint.model_index
        if index.get("expand_timesteps"):
            raise UnsupportedError(
                f"rollouts of {self.path}", ["expand_timesteps (Wan 2.2 TI2V 5B: a timestep a token) is not built"]
            )
        boundary = index.get("boundary_ratio")
        family = family_type(first.config, self._vae_scale())
        return DiffusionRollouts(
            self.transformers,
            family,
            self._scheduler(family),
            self._turns,
            max_batch=self.config.max_denoise_batch,
            boundary=None if boundary is None else boundary * 1000,
        )

    def _vae_scale(self) -> int:
        """Pixels a latent pixel; 8 where there is no VAE to tell."""
        if self.pipeline is None:
            return 8
        scale = getattr(self.pipeline, "vae_scale_factor", None)
        return self.pipeline.vae_scale_factor_spatial if scale is None else scale

    def _scheduler(self, family: Family) -> Any:
        if self.pipeline is not None:
            scheduler = self.pipeline.scheduler
            if "FlowMatchEuler" not in type(scheduler).__name__:
                log.info("%s lays the grid of steps only: the steps are the solver's", type(scheduler).__name__)
            return scheduler
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**family.scheduler)

    def generate(
        self, prompts: DiffusionPrompts, params: DiffusionParams | None = None, *, progress: bool = False
    ) -> list[DiffusionSample]:
        """Draw `params.n` samples of every prompt, prompt-major; prompts as text need the pipeline's encoders.

        `progress` shows a bar on stderr. While the engine is paused this waits for `resume`, and where it is put to
        sleep meanwhile, for new weights; begun asleep it is an `AsleepError`. Batches of several threads take turns.
        """
        self._check_begin()
        call = self._call(DiffusionParams() if params is None else params)
        embeds = embed_prompts(prompts, call.params, self.rollouts.family, self.pipeline, self.device, self.dtype)
        return self._run(call, self._seeds.wanted(call.params, embeds), progress=progress)

    async def agenerate(
        self, prompts: DiffusionPrompts, params: DiffusionParams | None = None
    ) -> list[DiffusionSample]:
        """`generate` for an event loop, in a thread of its own; what has begun runs to its end."""
        return await asyncio.to_thread(self.generate, prompts, params)

    def step_inputs(self, samples: Sequence[DiffusionSample], step: int, *, negative: bool = False) -> dict[str, Any]:
        """Keywords of diffusers' forward as the rollout formed them at `step`: what a trainer computes anew.

        The samples are of one call, their prompts of equal lengths; `negative`: with their negative embeds.
        """
        self._check_open()
        embeds = [sample.embeds.negative if negative else sample.embeds for sample in samples]
        given = [place_embeds(one, self.device, self.dtype) for one in embeds if one is not None]
        if not samples or len(given) < len(samples):
            raise RequestError("step_inputs wants samples, with negative embeds where these are asked for")
        if len({one.prompt.shape for one in given}) > 1 or any(one.params != samples[0].params for one in samples):
            raise RequestError("step_inputs wants samples of one call, with prompts of equal lengths")
        latents = torch.stack([sample.latent(step) for sample in samples]).to(self.device, self.dtype)
        timestep = samples[0].timesteps[step].to(self.device).expand(len(samples))
        return self.rollouts.family.inputs(latents, timestep, given, samples[0].size, samples[0].params.guidance_scale)

    def replay(
        self,
        samples: Sequence[DiffusionSample],
        precision: Precisions | None = None,
        want: Sequence[Want] | None = None,
        *,
        progress: bool = False,
    ) -> list[DiffusionSample]:
        """The same samples again, from the same noise, with today's weights: in `precision`, or in their own."""
        self._check_begin()
        done: list[DiffusionSample] = []
        for params, group in itertools.groupby(samples, key=lambda sample: sample.params):
            changes = {"precision": precision, "want": want}
            changed = {key: value for key, value in changes.items() if value is not None}
            call = self._call(DiffusionParams(**{**asdict(params), **changed}))
            done += self._run(call, [self._again(sample) for sample in group], progress=progress)
        return done

    def _again(self, sample: DiffusionSample) -> Wanted:
        check_embeds(sample.embeds, self.rollouts.family, f"prompt {sample.prompt_index}")
        return Wanted(sample.prompt_index, place_embeds(sample.embeds, self.device, self.dtype), sample.seeds)

    def explore(
        self,
        prompts: DiffusionPrompts,
        *,
        reward: Reward,
        pool: int = 96,
        keep: tuple[int, int] = (12, 12),
        params: DiffusionParams | None = None,
        precision: Precisions = "bf16",
        progress: bool = False,
    ) -> list[Exploration]:
        """Rank a pool of quantized samples of every prompt by `reward`, and compute the `keep` best and worst again in
        `precision` from the same noise (Sol-RL, arXiv:2604.06916).

        `reward` gets all samples of one prompt and returns a finite number for each. Of equal rewards the sample that
        came first ranks higher. `params.n` is of no effect: `pool` is the number of samples. `StaleVersionError` where
        a swap came between a pool and its replay: explore again.
        """
        self._check_begin()
        check_keep(keep, pool)
        asked = DiffusionParams(**{**asdict(params or DiffusionParams()), "n": pool})
        self._call(replace(asked, precision=precision))  # errors come before anything is computed
        samples = self.generate(prompts, asked, progress=progress)
        groups = [samples[start : start + pool] for start in range(0, len(samples), pool)]
        found: list[Exploration] = []
        for group in groups:
            rewards = read_rewards(reward(group), pool)
            best, worst = extremes(rewards, keep)
            ranked = [group[i] for i in (*best, *worst)]
            kept = self.replay(ranked, precision, progress=progress)
            check_versions(ranked, kept)
            found.append(Exploration(rewards=rewards, best=best, worst=worst, samples=kept))
        return found

    def _run(self, call: Call, wanted: Sequence[Wanted], *, progress: bool = False) -> list[DiffusionSample]:
        decode = self._decode if "image" in call.params.want else None
        with show_samples(len(wanted), shown=progress) as on_batch:
            return self.rollouts.run(call, wanted, decode, on_batch)

    @torch.no_grad()
    def _decode(self, call: Call, latents: Tensor) -> Tensor:
        return self.rollouts.family.decode(self.pipeline, latents, call.size)

    def _call(self, params: DiffusionParams) -> Call:
        """Check everything before anything is computed."""
        if "image" in params.want and getattr(self.pipeline, "vae", None) is None:
            raise RequestError(
                'want "image" needs a VAE, and there is none here: open a pipeline\'s folder that has one'
            )
        cfg = None
        if params.wants_cfg:
            scale = params.true_cfg_scale or 1.0
            cfg = scale, params.true_cfg_scale_2 or scale
        return self.rollouts.plan(params, self.rollouts.family.guidance(params), cfg)

    def sleep(self, tags: Sequence[SleepTag] = get_args(SleepTag)) -> None:
        """As `Engine.sleep`; with the weights go the CUDA graphs that read them."""
        self._check_tags(tags)
        if "weights" in tags:
            with self._turns.gate.visit():
                for transformer in self.transformers.values():
                    transformer.forget_graphs()
        super().sleep(tags)

    def pause(self, mode: Literal["keep"] = "keep") -> None:
        """Stop between two batches of samples, until `resume`; returns once none is under way.

        "keep" is the only mode: calls go on where they stopped.
        """
        if mode != "keep":
            raise RequestError(f"pause mode {mode!r}; possible: keep (batches under way run to their end)")
        self._check_open()
        self._turns.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._check_open()
        self._turns.resume()

    def _check_begin(self) -> None:
        self._check_open()
        self._turns.check_begin()

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
            "attention": "fp8" if self.config.attention == "fp8" else self.config.dtype,
            "max_denoise_batch": self.config.max_denoise_batch,
            "unfused": {name: one.unfused() for name, one in self.transformers.items()},
            "paused": self._turns.paused,
        }

    def _stop(self) -> StepGate:
        self._turns.close()
        return self._turns.gate

    def _drop(self) -> None:
        with self._made:
            self.transformers.clear()
            self._pipeline = self._rollouts = None


def _check_diffusion(config: EngineConfig) -> None:
    check_unchanged(config, LANGUAGE_SETTINGS, "language models")
    if config.attention not in ("auto", "fp8"):
        raise UnsupportedError(f"attention={config.attention!r}", ["diffusion transformers know 'auto' and 'fp8'"])
