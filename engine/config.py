"""What a user sets: `EngineConfig`, `QuantSpec`, `SamplingParams`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import msgspec
from msgspec import Struct

from ..quant import Activation, ConfigError, QuantName, UnsupportedError
from ..weight_sync import MasterPlace, SwapMode

DTypeName = Literal["bfloat16", "float32"]
DEFAULT_KEEP = ("lm_head", "*.gate")


class _Checked(type(Struct)):
    """Unknown fields and wrong values become one `ConfigError` that names what is possible."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        unknown = [name for name in kwargs if name not in cls.__struct_fields__]
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; "
                f"its fields: {', '.join(cls.__struct_fields__)}"
            )
        made = super().__call__(*args, **kwargs)
        for name, hint in get_type_hints(cls).items():
            value = getattr(made, name)
            try:
                msgspec.convert(value, hint, from_attributes=True)
            except msgspec.ValidationError as error:
                choices = [repr(choice) for part in (hint, *get_args(hint)) for choice in _choices(part)]
                possible = f"; possible: {', '.join(choices)}" if choices else ""
                raise ConfigError(f"{cls.__name__}.{name} = {_short(value)}: {error}{possible}") from None
        broken = [bound for bound, holds in made.bounds().items() if not holds]
        if broken:
            words = set(re.findall(r"\w+", " ".join(broken)))
            got = [f"{name}={_short(getattr(made, name))}" for name in cls.__struct_fields__ if name in words]
            raise ConfigError(f"{cls.__name__} wants {', '.join(broken)}; got {', '.join(got)}")
        return made


class Settings(Struct, frozen=True, metaclass=_Checked):
    """What users set. `bounds` says what must hold for the values, once their types are right."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            msgspec.structs.force_setattr(self, name, _frozen(getattr(self, name)))

    def bounds(self) -> dict[str, bool]:
        return {}


class FrozenDict(dict[Any, Any]):
    """A dict of settings: what its maker does to the original, and what others try on it, changes nothing."""

    def _refuse(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("settings are frozen: make new ones")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)


def _frozen(value: Any) -> Any:
    """Lists become tuples and dicts `FrozenDict`s; what else users give is immutable already."""
    if isinstance(value, list):
        return tuple(_frozen(one) for one in value)
    if isinstance(value, Mapping):
        return FrozenDict({key: _frozen(one) for key, one in value.items()})
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _choices(hint: Any) -> list[Any]:
    return [value for value in get_args(hint) if isinstance(value, str | int | None)]


class QuantSpec(Settings, frozen=True):
    """Quantization by module: `layers` maps patterns over whole dotted names to formats, first match; else `quant`."""

    quant: QuantName = "bf16"
    layers: dict[str, QuantName] = {}


class NVFP4Layout(Settings, frozen=True):
    """How NVFP4 weights lie in a file.

    `nibbles`: which half of a byte holds even k ("low_first": the low one, as ModelOpt packs; "high_first": as
    Black Forest Labs and Comfy do). `scales`: "linear" rows, or tiles of "128x4".
    """

    nibbles: Literal["low_first", "high_first"]
    scales: Literal["linear", "128x4"]


class EngineConfig(Settings, frozen=True):
    """How an engine holds and computes its weights.

    `quant` None: as the checkpoint says. `activation` None: the checkpoint's static scales where it has them, else
    per token. `keep`: patterns (whole dotted names, `*`) of modules that stay in BF16; None: `lm_head` and routers
    where BF16 weights are quantized, and what the checkpoint keeps where they come quantized. `swap`: "staged" builds a
    second packed copy and swaps atomically; "host" writes in place while generation is paused, and puts back what a
    failed swap has overwritten from a copy in (pinned) host memory; "streamed" keeps no copy, a failure poisons the
    engine. `master`: "host" keeps the BF16 weights that came in, two bytes a parameter, for `update_lora`,
    `quantization_error` and `wake`.

    Language models: `max_batch_size`: sequences that are decoded together; `max_step_tokens`: tokens computed in one
    step, so that long prompts come in chunks; `kv_cache_tokens`: room for keys and values (None: what
    `max_batch_size` sequences can need, 2 GiB at the most); `memory_fraction`, in its place: how much of a GPU's memory
    may be in use once the engine is open, whoever holds it, with a second copy for `swap="staged"`: keys and values
    take what is left of that, steps and their buffers the rest; `kv_cache_dtype`: "fp8" keeps them in E4M3 with the
    checkpoint's scales, or 1 where it has none ("auto": as the checkpoint says, else in `dtype`); `prefix_cache`:
    reuse keys and values of equal beginnings; `attention`: "auto" takes FlashInfer's on a GPU that has it, and on
    Hopper a kernel of our own to decode;
    `batch_invariant`: a request's tokens and log-probs have the same bits whatever is computed beside it, on a GPU at
    a cost (docs/rollouts.md says what is promised); a choice that cannot is an error; `cuda_graphs`: decoding steps
    as CUDA graphs, there (and forwards of diffusion transformers that have fused kernels); `overlap`: launch a step
    before the host has read the tokens of the one before (None: on a GPU).
    Diffusion transformers: `dual`: "bf16" keeps a BF16 copy of the quantized layers beside them, for two precisions
    in one rollout and for `replay`; `max_denoise_batch`: samples that are denoised together; `base`: folder or hub id
    of the pipeline that brings what a file of transformer weights lacks; `layout`: how a file of NVFP4 weights lies,
    where it does not say so itself; `attention`: "fp8" attends in FP8 where layers compute quantized (FLUX.1).
    """

    quant: QuantName | QuantSpec | None = None
    activation: Activation | None = None
    keep: Sequence[str] | None = None
    linear_kernel: str = "auto"
    moe_runner: str = "auto"
    swap: SwapMode = "staged"
    master: MasterPlace | None = None
    dtype: DTypeName = "bfloat16"
    device: str = "auto"
    tp: int = 1
    ep: int = 1
    seed: int = 0
    max_batch_size: int = 256
    max_step_tokens: int = 2048
    attention: Literal["auto", "torch", "flashinfer", "fp8"] = "auto"
    batch_invariant: bool = False
    cuda_graphs: bool = True
    overlap: bool | None = None
    kv_cache_tokens: int | None = None
    memory_fraction: float | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    prefix_cache: bool = True
    dual: Literal["bf16"] | None = None
    max_denoise_batch: int = 8
    base: str | None = None
    layout: NVFP4Layout | None = None

    def bounds(self) -> dict[str, bool]:
        return {
            "max_denoise_batch >= 1": self.max_denoise_batch >= 1,
            "1 <= max_batch_size <= max_step_tokens": 1 <= self.max_batch_size <= self.max_step_tokens,
            "0 < memory_fraction < 1": self.memory_fraction is None or 0 < self.memory_fraction < 1,
            "kv_cache_tokens or memory_fraction": self.kv_cache_tokens is None or self.memory_fraction is None,
            "kv_cache_tokens >= 1": self.kv_cache_tokens is None or self.kv_cache_tokens >= 1,
            "0 <= seed < 2**31": 0 <= self.seed < 2**31,
        }


LANGUAGE_SETTINGS = (
    "moe_runner",
    "max_batch_size",
    "max_step_tokens",
    "kv_cache_tokens",
    "memory_fraction",
    "kv_cache_dtype",
    "prefix_cache",
    "batch_invariant",
    "overlap",
)
DIFFUSION_SETTINGS = ("dual", "max_denoise_batch", "base", "layout")


def check_unchanged(config: EngineConfig, names: Sequence[str], whose: str) -> None:
    """`UnsupportedError` unless these have their defaults: a choice that nobody would honour."""
    given = {name: getattr(config, name) for name in names}
    changed = [f"{name}={value!r}" for name, value in given.items() if value != getattr(EngineConfig(), name)]
    if changed:
        raise UnsupportedError(", ".join(changed), [f"these are for {whose}; leave them at their defaults"])


LogprobMode = Literal["temperature", "sampled", "raw", "processed"]
LARGEST = 1e6  # of temperatures, penalties and biases, and the inverse of the smallest: float32 logits stay finite


class SamplingParams(Settings, frozen=True):
    """How completions are drawn.

    `temperature` 0 is greedy (log-probs then at temperature 1); `top_k` 0, `top_p` 1 and `min_p` 0 switch these off.
    Processing goes: `allowed_token_ids`, `logit_bias`, penalties, temperature, top-k, top-p, min-p.
    `seed` None gives every completion its own, and reports it; completion i of n draws with `seed + i`.
    `stop`: token ids and strings that end a completion, besides the model's end-of-sequence tokens (unless
    `ignore_eos`); the text ends before a stop string, the token ids hold all that was drawn.
    `logprobs`: "temperature" (also called "sampled"): softmax(logits / temperature), without penalties or
    truncation; "raw": softmax(logits); "processed": what was drawn from. `top_logprobs` many more, in that mode;
    `prompt_logprobs`: of the prompt's tokens, too ("processed" counts as "temperature" there).
    `sampling_mask`: which tokens could be drawn. docs/sampling.md tells more.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: Sequence[int] | None = None
    max_new_tokens: int = 256
    seed: int | None = None
    stop: Sequence[int | str] | str = ()
    ignore_eos: bool = False
    logprobs: LogprobMode | None = "temperature"
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    sampling_mask: bool = False

    def bounds(self) -> dict[str, bool]:
        return {
            "n >= 1": self.n >= 1,
            "temperature 0 or 1e-6 to 1e6": self.temperature == 0 or 1 / LARGEST <= self.temperature <= LARGEST,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "top_k >= 0": self.top_k >= 0,
            "0 <= min_p <= 1": 0 <= self.min_p <= 1,
            "1e-6 <= repetition_penalty <= 1e6": 1 / LARGEST <= self.repetition_penalty <= LARGEST,
            "-1e6 <= frequency_penalty <= 1e6": abs(self.frequency_penalty) <= LARGEST,
            "-1e6 <= presence_penalty <= 1e6": abs(self.presence_penalty) <= LARGEST,
            "logit_bias -1e6 to 1e6, or -inf": all(abs(b) <= LARGEST or b == -inf for b in self.logit_bias.values()),
            "max_new_tokens >= 1": self.max_new_tokens >= 1,
            "0 <= seed <= 2**63 - n": self.seed is None or 0 <= self.seed <= 2**63 - self.n,
            "allowed_token_ids not empty": self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "stop strings not empty": all(self.stop_strings) and self.stop != "",
            "top_logprobs >= 0": self.top_logprobs >= 0,
        }

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else [one for one in self.stop if isinstance(one, str)]

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return frozenset() if isinstance(self.stop, str) else frozenset(t for t in self.stop if isinstance(t, int))

    @property
    def prompt_temperature(self) -> float:
        """Of the prompt's log-probs."""
        return 1.0 if self.logprobs == "raw" else self.temperature or 1.0

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p cut the distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """Whether bias, allowed tokens or penalties shape the logits."""
        return self.allowed_token_ids is not None or bool(self.logit_bias) or self.penalizes

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were drawn shape the logits."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
