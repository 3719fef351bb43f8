"""What a user sets: `EngineConfig`, `QuantSpec`, `SamplingParams`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Struct

from ..quant import Activation, ConfigError, QuantName
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
                raise ConfigError(f"{cls.__name__}.{name} = {value!r}: {error}{possible}") from None
        return made


def _choices(hint: Any) -> list[Any]:
    return [value for value in get_args(hint) if isinstance(value, str | int | None)]


class QuantSpec(Struct, frozen=True, metaclass=_Checked):
    """Quantization by module: `layers` maps patterns over whole dotted names to formats, first match; else `quant`."""

    quant: QuantName = "bf16"
    layers: dict[str, QuantName] = {}


class EngineConfig(Struct, frozen=True, metaclass=_Checked):
    """How an engine holds and computes its weights.

    `quant` None: as the checkpoint says. `activation` None: the checkpoint's static scales where it has them, else
    per token. `keep`: patterns (whole dotted names, `*`) of modules that stay in BF16; None: `lm_head` and routers
    where BF16 weights are quantized, and what the checkpoint keeps where they come quantized. `swap`: "staged" builds a
    second packed copy and swaps atomically; "streamed" keeps none, a failure poisons the engine. `master`: "host" keeps
    the BF16 weights that came in, two bytes a parameter, for `update_lora`, `quantization_error` and `wake`.
    `max_batch_size`: sequences that are decoded together.
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

    def __post_init__(self) -> None:
        bounds = {"max_batch_size >= 1": self.max_batch_size >= 1, "0 <= seed < 2**31": 0 <= self.seed < 2**31}
        _check_bounds(self, bounds)


class SamplingParams(Struct, frozen=True, metaclass=_Checked):
    """How completions are drawn.

    `temperature` 0 is greedy (log-probs then at temperature 1); `top_k` 0 and `top_p` 1 switch these off; `seed`
    None gives every completion its own; completion i of n draws with `seed + i`. `stop`: token ids that end a
    completion, besides the model's end-of-sequence tokens (unless `ignore_eos`).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int | None = None
    stop: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: Literal["sampled"] | None = "sampled"

    def __post_init__(self) -> None:
        bounds = {
            "n >= 1": self.n >= 1,
            "temperature >= 0": self.temperature >= 0,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "top_k >= 0": self.top_k >= 0,
            "max_new_tokens >= 1": self.max_new_tokens >= 1,
            "0 <= seed < 2**63": self.seed is None or 0 <= self.seed < 2**63,
        }
        _check_bounds(self, bounds)


def _check_bounds(settings: Struct, bounds: dict[str, bool]) -> None:
    broken = [bound for bound, holds in bounds.items() if not holds]
    if broken:
        raise ConfigError(f"{type(settings).__name__} wants {', '.join(broken)}; got {settings}")
