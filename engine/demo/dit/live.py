"""What a person at the terminal sees while the demo runs."""

from __future__ import annotations

import statistics

from ...report.dit.history import DitStepRecord
from ..live import TableWords

WORDS = TableWords(
    columns=("step", "version", "reward", "right", "2nd judge", "images/s", "train s", "swap ms", "log-prob gap"),
    title="Flow-GRPO on digits: rollouts from quantized weights",
    caption="right: read as the digit asked for. log-prob gap: mean |rollout's - trainer's|",
)


def cells(record: DitStepRecord) -> list[str]:
    """One row of `WORDS.columns`."""
    return [
        str(record.step),
        record.version,
        f"{record.reward:.3f}±{record.reward_error:.3f}",
        f"{record.right:.0%}",
        f"{record.second_right:.0%}",
        f"{record.images_per_second:.0f}",
        f"{record.train_seconds:.1f}",
        f"{record.swap_seconds * 1000:.0f}",
        f"{statistics.fmean(record.logprob_gap):.1e}",
    ]
