"""The largest input of every linear over some rollouts, as the BF16 transformer sees them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from msgspec.structs import replace
from torch import Tensor

from ...quant import AmaxMeter, ModelError
from ..config import EngineConfig
from ..dit.embeds_file import read_embeds
from ..dit.engine import DiffusionEngine
from ..dit.params import DiffusionParams
from .report import Progress


class DiffusionCalibration:
    """`amax[module]`: float32 scalar, max |x| of what entered that linear, over all samples and steps."""

    def __init__(self, amax: dict[str, Tensor], samples: int, tokens: int) -> None:
        self.amax, self.samples, self.tokens = amax, samples, tokens


def calibrate_diffusion(
    path: str | Path,
    config: EngineConfig,
    embeds: Path,
    params: DiffusionParams,
    modules: Collection[str],
    progress: Progress,
) -> DiffusionCalibration:
    """Denoise one sample of every prompt as `config` and `params` say, recording what enters `modules`; `tokens` counts
    those of the prompts.

    Raises `ModelError` if one of them was never reached: Wan 2.2's second transformer needs steps of low noise.
    """
    prompts = read_embeds(embeds)
    with DiffusionEngine(path, config) as engine:
        meters: dict[str, AmaxMeter] = {}
        for slot in engine._slots:
            if slot.shape.cols is not None:
                slot.meter = meter = AmaxMeter(engine.device)
                meters |= dict.fromkeys(slot.modules[0], meter)
        for done, prompt in enumerate(prompts):
            progress("calibrating", done, len(prompts))
            engine.generate(prompt, replace(params, n=1, want=("latents:final",)))
        progress("calibrating", len(prompts), len(prompts))
        amax = {module: meters[module].amax.cpu() for module in modules}
    unseen = sorted(module for module, value in amax.items() if not value)
    if unseen:
        raise ModelError(
            f"calibration reached {len(amax) - len(unseen)} of {len(amax)} modules, and not {', '.join(unseen[:6])}; "
            "take more steps"
        )
    return DiffusionCalibration(amax, len(prompts), sum(len(prompt.prompt) for prompt in prompts))
