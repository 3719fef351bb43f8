"""One step's rollouts: problems in, scored completions out."""

import statistics

import msgspec

from ..config import SamplingParams
from ..llm.engine import LanguageEngine
from ..report.history import Completion as ShownCompletion
from ..types import Completion
from .groups import Group
from .task import Problem, Score, score


class Rollouts(msgspec.Struct, frozen=True):
    """Completions and their scores, prompt-major: `len(problems) * samples` of each."""

    problems: list[Problem]
    samples: int
    completions: list[Completion]
    scores: list[Score]

    @property
    def rewards(self) -> list[float]:
        return [score.reward for score in self.scores]

    @property
    def reward_error(self) -> float:
        """Standard error of the mean reward; completions of one prompt are not independent, so over prompt means."""
        means = [statistics.fmean(group.rewards) for group in self.groups()]
        return statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0

    @property
    def num_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    def share(self, field: str) -> float:
        """Share of completions whose score says yes to `field`."""
        return statistics.fmean(bool(getattr(score, field)) for score in self.scores)

    def groups(self) -> list[Group]:
        """What the trainer learns from."""
        return [self._group(start) for start in range(0, len(self.completions), self.samples)]

    def _group(self, start: int) -> Group:
        members = self.completions[start : start + self.samples]
        logprobs = [member.logprobs for member in members if member.logprobs is not None]
        rewards = self.rewards[start : start + self.samples]
        return Group(members[0].prompt_token_ids, [member.token_ids for member in members], logprobs, rewards)

    def sequences(self) -> list[tuple[list[int], int]]:
        """(prompt + completion, length of the prompt) of every sample."""
        return [(c.prompt_token_ids + c.token_ids, len(c.prompt_token_ids)) for c in self.completions]

    def shown(self) -> list[ShownCompletion]:
        """What a reader of the report sees."""
        return [
            ShownCompletion(self.problems[i // self.samples].question, completion.text or "", self.scores[i].reward)
            for i, completion in enumerate(self.completions)
        ]


def draw_rollouts(engine: LanguageEngine, problems: list[Problem], samples: int, budget: int) -> Rollouts:
    """`samples` completions of each problem within `budget` new tokens, at temperature 1."""
    prompts = [problem.messages() for problem in problems]
    completions = engine.generate(prompts, SamplingParams(n=samples, max_new_tokens=budget))
    scores = [
        score(problems[i // samples], c.text or "", len(c.token_ids), c.finish_reason == "stop", budget)
        for i, c in enumerate(completions)
    ]
    return Rollouts(problems, samples, completions, scores)
