"""The largest input of every weight over some texts, as the BF16 engine sees them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from ...quant import AmaxMeter
from ..config import EngineConfig
from ..llm.engine import LanguageEngine
from .report import Progress
from .texts import read_sequences


class Calibration:
    """`amax[slot]`: float32 scalar, max |x| of what entered that weight; an expert stack's is over all its experts."""

    def __init__(self, amax: dict[str, Tensor], sequences: Sequence[Sequence[int]]) -> None:
        self.amax, self.sequences = amax, len(sequences)
        self.tokens = sum(map(len, sequences))


def calibrate(
    folder: Path, weights: Collection[str], texts: Path, *, length: int, count: int, device: str, progress: Progress
) -> Calibration:
    """Run the checkpoint in BF16 over `texts`, recording what enters the slots named in `weights`.

    Sequences run alone, `length` tokens each (less where the model's context is shorter), at most `count` of them.
    """
    with LanguageEngine(folder, EngineConfig(quant="bf16", device=device)) as engine:
        length = min(length, engine.model.config.max_position)
        sequences = read_sequences(texts, engine.tokenizer, length=length, count=count)
        meters = {slot.name: AmaxMeter(engine.model.device) for slot in engine.model.slots if slot.name in weights}
        for slot in engine.model.slots:
            slot.meter = meters.get(slot.name)
        for done, ids in enumerate(sequences):
            progress("calibrating", done, len(sequences))
            engine.logits([ids])
        progress("calibrating", len(sequences), len(sequences))
        return Calibration({name: meter.amax.cpu() for name, meter in meters.items()}, sequences)
