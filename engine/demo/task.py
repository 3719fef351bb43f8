"""The demo's task: small sums in words, scored by plain rules that a person can check by eye."""

import random
import re

import msgspec

SYSTEM = "Answer with a number."
NAMES = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Ella", "Jack", "Rosa"]
THINGS = ["apples", "pens", "books", "cats", "coins", "shells", "cards", "eggs", "stones", "cakes"]
TEMPLATES = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have?",
    "What is {a} plus {b}?",
    "{name} has {a} {things} and finds {b} more. How many {things} now?",
    "What is {a} + {b}?",
)
SUMS = range(3, 11)  # the most that a noisy 135M-class model can be asked for


class Problem(msgspec.Struct, frozen=True):
    """One question and its whole-number answer."""

    question: str
    answer: int

    def messages(self) -> list[dict[str, str]]:
        """The question as chat messages, for the model's own chat template."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.question}]


class Score(msgspec.Struct, frozen=True):
    """What the rules gave one completion; `reward` lies in [0, 1]."""

    reward: float
    correct: bool
    ended: bool


def draw_problems(num: int, rng: random.Random) -> list[Problem]:
    """`num` fresh problems. Sums and templates take turns, so that every step is as hard as the one before."""
    sums = rng.sample(SUMS, len(SUMS))
    return [draw_problem(sums[i % len(sums)], TEMPLATES[i % len(TEMPLATES)], rng) for i in range(num)]


def draw_problem(answer: int, template: str, rng: random.Random) -> Problem:
    a = rng.randint(2, answer - 1)  # "1 apples" would be no English
    return Problem(template.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=answer - a), answer)


def score(problem: Problem, text: str, num_tokens: int, ended: bool, budget: int) -> Score:
    """Half for the number, half for brevity: `reward = near / 2 + brief / 2`, 0 where no digit was written.

    `near` is 1 if the last number is right and falls to 0 at a distance of 5; `brief` is the unused share of the
    `budget` tokens, and 0 unless the model ended by itself.
    """
    numbers = re.findall(r"\d+", text)
    if not numbers:
        return Score(0.0, False, ended)
    distance = abs(int(numbers[-1][:9]) - problem.answer)
    near = max(0.0, 1.0 - distance / 5)
    brief = 1.0 - num_tokens / budget if ended else 0.0
    return Score((near + brief) / 2, distance == 0, ended)
