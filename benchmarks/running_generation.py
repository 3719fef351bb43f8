"""A generation that goes on in a thread while something else is measured."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

from rollmill.engine import SamplingParams


class Generation:
    """N sequences generated in a thread, whose steps' ends are kept."""

    def __init__(self, engine: Any, sequences: int, prompt: int = 128, new: int = 4000) -> None:
        self.engine, self.ends, self.outs = engine, list[float](), list[Any]()
        self.versions = [engine.weight_version]  # that it must have seen
        step = engine.rollouts.step

        def timed() -> None:
            step()
            self.ends.append(time.perf_counter())

        engine.rollouts.step = timed
        prompts = [[1000 + 7 * i + k for k in range(prompt)] for i in range(sequences)]
        params = SamplingParams(temperature=1.0, max_new_tokens=new, ignore_eos=True, seed=5)
        self.thread = threading.Thread(target=lambda: self.outs.extend(engine.generate(prompts, params)))
        self.sequences = sequences
        self._captured: set[int] = set()

    def start(self, steps: int = 20) -> None:
        self.thread.start()
        self.wait(steps)
        self._captured = set(self._graphs())

    def wait(self, steps: int) -> None:
        """For some more steps."""
        wanted, patience = len(self.ends) + steps, time.monotonic() + 90
        while len(self.ends) < wanted and self.thread.is_alive() and time.monotonic() < patience:
            time.sleep(0.01)

    def stop(self) -> None:
        """End all sequences; raises unless each of them has lived through every version, without a new graph."""
        captured = set(self._graphs())
        self.engine.abort()
        self.thread.join(60)
        del self.engine.rollouts.step
        assert len(self.outs) == self.sequences, f"{len(self.outs)} of {self.sequences} requests came back"
        for out in self.outs:
            assert [span.version for span in out.weight_versions] == self.versions, out.weight_versions
            assert out.weight_versions[-1].end == len(out.token_ids)
        assert captured == self._captured, "steps were captured again"

    def _graphs(self) -> list[int]:
        graphs = self.engine.rollouts.forward.graphs
        return [] if graphs is None else [id(graph) for graph in graphs._graphs.values()]

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between ends of steps, of those that touch this time."""
        pairs = zip(self.ends, self.ends[1:], strict=False)
        return [b - a for a, b in pairs if b >= start and a <= end]

    def step_seconds(self) -> float:
        """The median of the last steps."""
        return statistics.median(self.gaps(*self.ends[-11:-1:9]))
