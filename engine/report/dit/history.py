"""What a run of the demo leaves behind: everything that its report draws, and nothing else."""

from pathlib import Path

import msgspec

Pixels = bytes  # ink of 8 x 8 pixels, row by row, 0 (paper) to 255; base64 in JSON


class Picture(msgspec.Struct, frozen=True):
    """One image, the digit that was asked for, and its reward."""

    digit: int
    reward: float
    pixels: Pixels


class DitStepRecord(msgspec.Struct, frozen=True):
    """One RL step: rollouts from `version`, one optimizer step, one swap to the next version. Times in seconds."""

    step: int
    version: str
    reward: float  # mean over the step's images
    reward_error: float  # standard error of that mean, over the prompts
    right: float  # share of images that the judge reads as their digit
    second_right: float  # the same of a judge that learned from other images and gives no rewards
    num_images: int
    rollout_seconds: float
    train_seconds: float
    swap_seconds: float  # as the trainer waits for it, its own casts to BF16 included
    swap: dict[str, float]  # the engine's own account, by phase
    kl: float  # of the trainer's policy to the one before training
    logprob_gap: list[float]  # mean |trainer's log-prob - rollout's| at every denoising step
    beyond_clip: float  # share of (image, denoising step) that this gap alone would carry out of the clip range

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.rollout_seconds


class Strip(msgspec.Struct, frozen=True):
    """One sample, step by step: what the model takes the clean image to be. `window` is half-open."""

    name: str
    digit: int
    window: tuple[int, int]
    precisions: list[str]
    sigmas: list[float]  # steps + 1
    pictures: list[Pixels]  # one a step, and the sample itself


class FormatResult(msgspec.Struct, frozen=True):
    """One format against BF16, from the same noise."""

    name: str
    pictures: list[Picture]
    psnr: list[float]  # dB, of each picture against BF16's
    right: float  # share that the judge reads as their digit
    rank_correlation: float  # Spearman's, of rewards
    top_overlap: float  # share of BF16's best quarter that is in this format's best quarter, too
    logprob_gap: list[float]  # mean |BF16's log-prob - this format's| at every denoising step, of its own trajectories
    largest_gap: float


class Comparison(msgspec.Struct, frozen=True):
    """The trained policy in every precision."""

    bf16: list[Picture]
    bf16_right: float
    formats: list[FormatResult]


class DitHistory(msgspec.Struct):
    """A whole run. `setup` maps what was set up to seconds; pictures of a digit lie side by side."""

    model: str
    quant: str
    seed: int
    trained: str
    clip: float
    setup: dict[str, float]
    steps: list[DitStepRecord] = []
    before: list[Picture] = []
    after: list[Picture] = []  # from the same noise as `before`
    strips: list[Strip] = []
    comparison: Comparison | None = None
    total_seconds: float = 0.0

    def write_json(self, path: Path) -> None:
        """The history as indented JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
