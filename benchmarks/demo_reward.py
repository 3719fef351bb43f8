"""Does the demo learn? Reward gain over several seeds, in standard errors.

Figure: (mean reward of the last 3 steps - mean of the first 3) / standard error, over seeds. The reward of a step is
the mean of its completions; the standard error is that of the difference over the seeds' paired gains.
"""

from __future__ import annotations

import argparse
import statistics
from math import sqrt
from pathlib import Path

from record import make_result, save

from rollmill.engine.demo.config import DemoConfig
from rollmill.engine.demo.run import run_demo
from rollmill.engine.env import cache_home

BAR = 2.0  # standard errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    arguments = parser.parse_args()
    gains, seconds = [], []
    for seed in range(arguments.seeds):
        config = DemoConfig(seed=seed, steps=arguments.steps, compare_static=False)
        history = run_demo(None, config, out=arguments.out / f"seed-{seed}", cache=Path(cache_home()) / "rollmill")
        rewards = [step.reward for step in history.steps]
        gains.append(statistics.fmean(rewards[-3:]) - statistics.fmean(rewards[:3]))
        seconds.append(history.total_seconds)
        print(f"seed {seed}: gain {gains[-1]:.3f}, {seconds[-1]:.0f} s", [f"{r:.2f}" for r in rewards])
    error = statistics.stdev(gains) / sqrt(len(gains))
    listed = ", ".join(f"{gain:+.3f}" for gain in gains)
    note = f"{arguments.seeds} seeds, {arguments.steps} steps; gains {listed}; {max(seconds):.0f} s a run at the most"
    gain = statistics.fmean(gains) / error
    save("demo_reward", [make_result("demo_reward_gain_se", gain, "standard errors", limit=BAR, note=note)])


if __name__ == "__main__":
    main()
