"""What a run leaves behind: everything that its report draws, and nothing else."""

from pathlib import Path
from typing import Literal

import msgspec

WeightKind = Literal["qkv", "o", "w13", "w2"]


class Completion(msgspec.Struct, frozen=True):
    """One sampled answer with its reward."""

    prompt: str
    text: str
    reward: float


class StepRecord(msgspec.Struct, frozen=True):
    """One RL step: rollouts from `version`, one optimizer step, one swap to the next version. Times in seconds."""

    step: int
    version: str
    reward: float  # mean over the step's completions
    reward_error: float  # standard error of that mean
    correct: float  # share of completions with the right number
    ended: float  # share of completions that ended by themselves within the budget
    mean_tokens: float  # of a completion
    num_tokens: int  # sampled in this step
    rollout_seconds: float
    train_seconds: float
    swap_seconds: float  # as the trainer waits for it, its own casts to BF16 included
    measure_seconds: float  # KL, and the comparison engine's swap: what a real run would not spend
    swap: dict[str, float]  # the engine's own account, by phase
    kl: float  # mean KL(trainer || rollout) of a completion token, nats
    kl_static: float | None  # the same for the engine with static activation scales
    mean_ratio: float  # p_trainer / p_rollout of the sampled tokens
    truncated: float  # share of tokens whose ratio was cut

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.rollout_seconds


class WeightError(msgspec.Struct, frozen=True):
    """Relative RMS error that quantization leaves in one weight (experts of a layer together)."""

    layer: int
    kind: WeightKind
    error: float


class History(msgspec.Struct):
    """A whole run. `setup` maps what was set up to seconds."""

    model: str
    quant: str
    seed: int
    trained: str
    setup: dict[str, float]
    steps: list[StepRecord] = []
    before: list[Completion] = []
    after: list[Completion] = []
    weight_errors: list[WeightError] = []
    total_seconds: float = 0.0

    def write_json(self, path: Path) -> None:
        """The history as indented JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
