"""The demo's RL loop: rollouts, rewards, optimizer step, hot swap; again."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ...config import EngineConfig
from ...dit.engine import DiffusionEngine
from ...dit.params import FlowSDE
from ...dit.sample import DiffusionSample
from ...report.dit.history import Comparison, DitHistory, DitStepRecord, Strip
from ..live import LiveTable
from ..stopwatch import Stopwatch
from .compare import NAMES, compare, make_pictures
from .config import DitDemoConfig, Quant
from .digits import NUM_CLASSES
from .judge import Judge
from .live import cells
from .prompts import embeds_of
from .strips import make_strip
from .trainer import FlowGrpoTrainer, StepMetrics
from .trajectories import Trajectories, collect

ALL_DIGITS = range(NUM_CLASSES)
SHOWN_SEEDS = {"init_seed": 1_000_000, "step_seed": 2_000_000}  # of what is drawn before and after training
STRIP_DIGITS = (3, 8)


class DitDemoLoop:
    """A trainer and its engine, which holds the policy quantized and in BF16."""

    def __init__(self, folder: Path, config: DitDemoConfig, live: LiveTable) -> None:
        self.folder, self.config, self.live = folder, config, live
        self.rng = random.Random(config.seed)
        self.judge, self.second_judge = Judge("train"), Judge("held_out")
        self.engines = ExitStack()
        live.say("opening the trainer")
        with Stopwatch() as trainer:
            self.trainer = FlowGrpoTrainer(folder, config.trainer)
        live.say(f"opening the engine: quantizing to {config.quant}")
        with Stopwatch() as engine:
            self.engine = self.open_engine(config.quant)
        self.setup = {"trainer": trainer.seconds, "engine": engine.seconds}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.engines.close()

    def open_engine(self, quant: Quant) -> DiffusionEngine:
        """An engine of the model before training; float32 arithmetic, as the trainer's: what differs is the quant."""
        config = EngineConfig(
            quant=quant,
            dual="bf16",
            dtype="float32",
            seed=self.config.seed,
            max_denoise_batch=self.config.prompts * self.config.samples,
        )
        return self.engines.enter_context(DiffusionEngine(self.folder, config))

    def run(self) -> DitHistory:
        """Every step, the same noise before and after, and the trained policy in every precision."""
        history = DitHistory(
            model="FLUX on digits",
            quant=self.config.quant,
            seed=self.config.seed,
            trained=self.trainer.describe(),
            clip=self.config.trainer.clip,
            setup=self.setup,
        )
        self.live.say("images before training")
        history.before = make_pictures(collect(self.draw_shown(), ALL_DIGITS), self.judge)
        for step in range(self.config.steps):
            history.steps.append(self.step(step))
            self.live.add(cells(history.steps[-1]))
        self.live.say("the same noise after training, in every precision")
        shown = self.draw_shown()
        history.after = make_pictures(collect(shown, ALL_DIGITS), self.judge)
        history.comparison = self.compare(shown)
        history.strips = self.strips()
        return history

    def step(self, step: int) -> DitStepRecord:
        """One RL step, timed phase by phase."""
        version, following = str(self.engine.weight_version), str(step + 1)
        digits = self.rng.sample(ALL_DIGITS, self.config.prompts)
        self.live.say(f"step {step}: rollouts from version {version}")
        with Stopwatch() as rolling:
            found = collect(self.draw(digits), digits)
            rewards = self.judge.rewards(found.ink, found.labels)
        self.live.say(f"step {step}: optimizer step")
        with Stopwatch() as training:
            metrics = self.trainer.step(found, rewards)
        self.live.say(f"step {step}: swap to version {following}")
        with Stopwatch() as swapping:
            report = self.engine.update_weights(self.trainer.weights(), version=following)
        return DitStepRecord(
            step=step,
            version=version,
            rollout_seconds=rolling.seconds,
            train_seconds=training.seconds,
            swap_seconds=swapping.seconds,
            swap={str(phase): seconds for phase, seconds in report.seconds.items()},
            **self.outcome(found, rewards, metrics),
        )

    def outcome(self, found: Trajectories, rewards: Tensor, metrics: StepMetrics) -> dict[str, Any]:
        """The fields of a record that tell how well the policy did, and how far the rollouts were from the trainer."""
        groups = rewards.unflatten(0, (-1, found.group)).mean(1)  # images of one prompt are not independent
        gaps = metrics.logprobs - found.logprobs
        judges = {"right": self.judge, "second_right": self.second_judge}
        return {
            "reward": rewards.mean().item(),
            "reward_error": (groups.std() / len(groups) ** 0.5).item() if len(groups) > 1 else 0.0,
            "num_images": len(rewards),
            "kl": metrics.kl,
            "logprob_gap": gaps.abs().mean(0).tolist(),
            "beyond_clip": ((gaps.exp() - 1).abs() > self.config.trainer.clip).float().mean().item(),
            **{name: judge.right(found.ink, found.labels).float().mean().item() for name, judge in judges.items()},
        }

    def draw(self, digits: list[int]) -> list[DiffusionSample]:
        return self.engine.generate([embeds_of(digit) for digit in digits], self.config.params(self.config.samples))

    def draw_shown(self) -> list[DiffusionSample]:
        """Every digit, always from the same noise."""
        params = self.config.params(self.config.compared, **SHOWN_SEEDS)
        return self.engine.generate([embeds_of(digit) for digit in ALL_DIGITS], params)

    def compare(self, shown: list[DiffusionSample]) -> Comparison:
        """The samples again in BF16 and in the other format, from an engine that is opened and swapped for it."""
        bf16 = collect(self.engine.replay(shown, precision="bf16"), ALL_DIGITS)
        found = {self.config.quant: collect(shown, ALL_DIGITS)}
        other: Quant = "fp8" if self.config.quant == "nvfp4" else "nvfp4"
        with Stopwatch() as opening:
            engine = self.open_engine(other)
            engine.update_weights(self.trainer.weights(), version=str(self.engine.weight_version))
        self.setup["second engine"] = opening.seconds
        found[other] = collect(engine.replay(shown), ALL_DIGITS)
        return compare(self.trainer.model, self.judge, bf16, {quant: found[quant] for quant in sorted(found)})

    def strips(self) -> list[Strip]:
        """Two digits each: all steps drawn, as in training, and a window in BF16 with the rest quantized."""
        name, middle = NAMES[self.config.quant], self.config.denoising_steps // 2
        window = FlowSDE(noise_level=self.config.noise_level, window=(middle - 1, middle + 1))
        ways = {
            f"all steps drawn, {name}": {},
            f"a window drawn in BF16, the rest {name}": {
                "solver": window,
                "precision": {"window": "bf16", "rest": "quantized"},
            },
        }
        embeds = [embeds_of(digit) for digit in STRIP_DIGITS]
        drawn = {
            way: self.engine.generate(embeds, self.config.params(1, **SHOWN_SEEDS, **changes))
            for way, changes in ways.items()
        }
        return [
            make_strip(way, STRIP_DIGITS[sample.prompt_index], sample, self.config.quant)
            for way, samples in drawn.items()
            for sample in samples
        ]
