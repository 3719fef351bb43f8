"""What an export tells: on the way, and at its end."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from .layout import QuantFormat

Progress = Callable[[str, int, int], None]  # phase, done, total


class ExportReport(Struct, frozen=True):
    """What was written. `activation`: how an engine that opens the folder quantizes activations.

    `modules` counts the quantized ones; `kept` names those in BF16 (norms and biases aside); `calibration_tokens` is
    None where no texts were given. Of a diffusion transformer, sequences are samples and tokens those of prompts.
    """

    folder: str
    quant: QuantFormat
    activation: str
    modules: int
    kept: tuple[str, ...]
    tensors: int
    files: int
    bytes_in: int
    bytes_out: int
    calibration_sequences: int | None
    calibration_tokens: int | None
    seconds: float
    warnings: tuple[str, ...] = ()
    is_diffusion: bool = False
