"""The reward is made of rules; these are they."""

from __future__ import annotations

import random

import pytest

from rollmill.engine.demo.task import Problem, draw_problems, score

FIVE = Problem("What is 2 + 3?", 5)


@pytest.mark.parametrize(
    ("text", "tokens", "ended", "reward"),
    [
        ("5", 6, True, 0.875),  # right, a quarter of the budget
        ("2 + 3 = 5", 24, True, 0.5),  # right, no token left
        ("2 + 3 = 5 and so", 24, False, 0.5),  # right, cut off
        ("6", 12, True, 0.65),  # off by one
        ("99", 12, True, 0.25),  # far off
        ("five", 3, True, 0.0),  # no digits: brevity alone earns nothing
        ("", 1, True, 0.0),
        ("1" * 5000, 24, False, 0.0),
    ],
)
def test_reward(text, tokens, ended, reward):
    assert score(FIVE, text, tokens, ended, budget=24).reward == pytest.approx(reward)


def test_every_step_is_equally_hard():
    rng = random.Random(3)
    first, second = draw_problems(8, rng), draw_problems(8, rng)
    assert first != second
    assert sorted(p.answer for p in first) == sorted(p.answer for p in second)
