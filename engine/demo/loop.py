"""The demo's RL loop: rollouts, rewards, optimizer step, hot swap; again."""

import random
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from ...quant import Activation, make_scheme
from ..config import EngineConfig
from ..llm.engine import LanguageEngine
from ..report.history import History, StepRecord
from .config import DemoConfig
from .divergence import mean_kl
from .live import LiveTable, cells
from .rollouts import Rollouts, draw_rollouts
from .static_scales import calibrate, write_static_folder
from .stopwatch import Stopwatch
from .task import Problem, draw_problems
from .trainer import GrpoTrainer, StepMetrics
from .weight_errors import weight_errors


class DemoLoop:
    """A trainer, its engine and, for comparison, a second engine with static activation scales."""

    def __init__(self, folder: Path, config: DemoConfig, live: LiveTable) -> None:
        self.folder, self.config, self.live = folder, config, live
        self.rng = random.Random(config.seed)
        self.engines = ExitStack()
        self.static: LanguageEngine | None = None
        live.say("opening the trainer")
        with Stopwatch() as trainer:
            self.trainer = GrpoTrainer(folder, config.trainer)
        live.say(f"opening the engine: quantizing to {config.quant}")
        with Stopwatch() as engine:
            self.engine = self.open_engine(folder, "per_token")
        self.setup = {"trainer": trainer.seconds, "engine": engine.seconds}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.engines.close()

    def open_engine(self, folder: Path, activation: Activation) -> LanguageEngine:
        config = EngineConfig(quant=self.config.quant, activation=activation, seed=self.config.seed)
        return self.engines.enter_context(LanguageEngine(folder, config))

    def run(self) -> History:
        """Every step, and completions of the same prompts before and after."""
        history = History(
            model=self.folder.name,
            quant=self.config.quant,
            seed=self.config.seed,
            trained=self.trainer.describe(),
            setup=self.setup,
        )
        shown = draw_problems(4, random.Random(self.config.seed + 1))
        self.live.say("some completions before training")
        history.before = self.draw(shown, 2).shown()
        for step in range(self.config.steps):
            history.steps.append(self.step(step))
            self.live.add(cells(history.steps[-1]))
        self.live.say("the same prompts after training, and quantization errors")
        history.after = self.draw(shown, 2).shown()
        weights, num_layers = dict(self.trainer.weights()), self.trainer.num_layers
        history.weight_errors = weight_errors(weights, num_layers, make_scheme(self.config.quant))
        return history

    def step(self, step: int) -> StepRecord:
        """One RL step, timed phase by phase."""
        version, following = str(self.engine.weight_version), str(step + 1)
        self.live.say(f"step {step}: rollouts from version {version}")
        with Stopwatch() as rolling:
            rollouts = self.draw(draw_problems(self.config.prompts, self.rng), self.config.samples)
        if self.config.compare_static and self.static is None:
            self.open_static(rollouts)
        self.live.say(f"step {step}: KL(trainer || rollout)")
        with Stopwatch() as measuring:
            kl, kl_static = self.divergences(rollouts)
        self.live.say(f"step {step}: optimizer step")
        with Stopwatch() as training:
            metrics = self.trainer.step(rollouts.groups())
        self.live.say(f"step {step}: swap to version {following}")
        with Stopwatch() as swapping:
            report = self.engine.update_weights(self.trainer.weights(), version=following)
        with Stopwatch() as comparing:
            if self.static is not None:
                self.static.update_weights(self.trainer.weights(), version=following)
        return StepRecord(
            step=step,
            version=version,
            rollout_seconds=rolling.seconds,
            train_seconds=training.seconds,
            swap_seconds=swapping.seconds,
            measure_seconds=measuring.seconds + comparing.seconds,
            swap={str(phase): seconds for phase, seconds in report.seconds.items()},
            kl=kl,
            kl_static=kl_static,
            **outcome(rollouts, metrics),
        )

    def draw(self, problems: list[Problem], samples: int) -> Rollouts:
        return draw_rollouts(self.engine, problems, samples, self.config.max_new_tokens)

    def divergences(self, rollouts: Rollouts) -> tuple[float, float | None]:
        """Mean KL(trainer || rollout) of this engine and of the static one, on one sample of a few prompts."""
        sequences = rollouts.sequences()[:: self.config.samples][: self.config.kl_sequences]
        logits = [self.trainer.logits(ids) for ids, _ in sequences]
        static = None if self.static is None else mean_kl(logits, self.static, sequences)
        return mean_kl(logits, self.engine, sequences), static

    def open_static(self, rollouts: Rollouts) -> None:
        """The second engine: activation scales calibrated on these first rollouts, then never again."""
        self.live.say("calibrating static activation scales for comparison")
        with Stopwatch() as opening, tempfile.TemporaryDirectory(prefix="rollmill-static-") as parent:
            sequences = [ids for ids, _ in rollouts.sequences()]
            stride = max(1, len(sequences) // self.config.calibration_sequences)
            amax = calibrate(self.trainer.model, sequences[::stride])
            folder = Path(parent) / "model"
            write_static_folder(self.folder, folder, amax, self.config.quant, self.trainer.num_experts)
            self.static = self.open_engine(folder, "static")
        self.setup["static engine"] = opening.seconds


def outcome(rollouts: Rollouts, metrics: StepMetrics) -> dict[str, Any]:
    """The fields of a `StepRecord` that tell how well the policy did."""
    return {
        "reward": statistics.fmean(rollouts.rewards),
        "reward_error": rollouts.reward_error,
        "correct": rollouts.share("correct"),
        "ended": rollouts.share("ended"),
        "num_tokens": rollouts.num_tokens,
        "mean_tokens": rollouts.num_tokens / len(rollouts.completions),
        "mean_ratio": metrics.mean_ratio,
        "truncated": metrics.truncated,
    }
