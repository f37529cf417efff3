"""Arithmetic word problems of graded difficulty: a quantity changes one to four times; how much is left.

A problem belongs to exactly one split, decided by the hash of its text. Splits are therefore disjoint whatever the
seeds and counts are.
"""

import hashlib
import random
from dataclasses import dataclass

from lark_jax.errors import ConfigError

SPLITS = ("pretrain", "pool", "test")
_BUCKETS = ("pretrain",) * 8 + ("pool", "test")
_MOST_DRAWS = 10_000  # without a new text, after which the split counts as used up


@dataclass(frozen=True)
class Step:
    """One line of the solution: `left operator right = result`."""

    left: int
    operator: str  # one of + - * /
    right: int
    result: int


@dataclass(frozen=True)
class Problem:
    problem_id: str
    text: str
    name: str  # who owns the things
    unit: str  # what they are, plural
    steps: tuple[Step, ...]
    answer: int
    level: int  # 1 (easiest) to 5


@dataclass(frozen=True)
class Level:
    num_steps: int
    largest_operand: int  # of additions, subtractions and the starting quantity
    largest_result: int
    operators: str


LEVELS = (
    Level(num_steps=1, largest_operand=9, largest_result=18, operators="+-"),
    Level(num_steps=2, largest_operand=9, largest_result=20, operators="+-"),
    Level(num_steps=2, largest_operand=20, largest_result=60, operators="+-*/"),
    Level(num_steps=3, largest_operand=20, largest_result=90, operators="+-*/"),
    Level(num_steps=4, largest_operand=50, largest_result=200, operators="+-*/"),
)
# Levels of successive problems. The base student is pre-trained mostly on easy ones.
_LEVEL_CYCLES = {"pretrain": (1, 2, 3, 1, 2, 4, 1, 2, 3, 5), "pool": (1, 2, 3, 4, 5), "test": (1, 2, 3, 4, 5)}

_NAMES = ("Ana", "Ben", "Dora", "Emil", "Ines", "Jan", "Kira", "Leo", "Mia", "Nils", "Omar", "Rosa")
_UNITS = ("apples", "beads", "books", "cards", "coins", "eggs", "nuts", "pens", "seeds", "shells", "stamps", "stones")
_FACTORS = (2, 3, 4)
_EVENTS = {
    "+": ("{name} buys {n} more.", "{name} finds {n} more.", "A friend brings {n} more."),
    "-": ("{name} gives away {n}.", "{name} loses {n}.", "{name} sells {n}."),
    "*": ("The number grows to {n} times as many.", "{name} then trades them for {n} times as many."),
    "/": ("{name} makes {n} equal piles and keeps one.", "{name} shares them with a group of {n} and keeps one share."),
}


def split_of(text: str) -> str:
    """The one split that a problem with this text may appear in."""
    digest = hashlib.sha256(text.encode()).digest()
    return _BUCKETS[int.from_bytes(digest[:8], "big") % len(_BUCKETS)]


def generate_problems(seed: int, count: int, split: str) -> tuple[Problem, ...]:
    """`count` problems with distinct texts; the same arguments give the same problems.

    Levels take turns: all equally often in "pool" and "test", the easy ones more often in "pretrain".

    Raises:
      ConfigError: `split` is unknown, or has fewer than `count` distinct problems.
    """
    if split not in SPLITS:
        raise ConfigError(f"synthetic split: expected one of {', '.join(SPLITS)}, got {split!r}")
    seen: set[str] = set()
    problems = []
    for index in range(count):
        level = _LEVEL_CYCLES[split][index % len(_LEVEL_CYCLES[split])]
        problem = _draw_unseen(random.Random(f"{seed}/{split}/{index}"), f"{split}-{index:05d}", level, split, seen)
        seen.add(problem.text)
        problems.append(problem)
    return tuple(problems)


def _draw_unseen(rng: random.Random, problem_id: str, level: int, split: str, seen: set[str]) -> Problem:
    for _ in range(_MOST_DRAWS):
        problem = _draw(rng, problem_id, level)
        if split_of(problem.text) == split and problem.text not in seen:
            return problem
    raise ConfigError(
        f"config.synthetic: the {split} split has no more problems of level {level} after {len(seen)} problems; "
        "ask for fewer"
    )


def _draw(rng: random.Random, problem_id: str, level: int) -> Problem:
    rules = LEVELS[level - 1]
    name, unit = rng.choice(_NAMES), rng.choice(_UNITS)
    quantity = rng.randint(2, rules.largest_operand)
    sentences = [f"{name} has {quantity} {unit}."]
    steps = []
    for _ in range(rules.num_steps):
        step = _draw_step(rng, quantity, rules)
        sentences.append(rng.choice(_EVENTS[step.operator]).format(name=name, n=step.right))
        steps.append(step)
        quantity = step.result
    sentences.append(f"How many {unit} does {name} have now?")
    return Problem(problem_id, " ".join(sentences), name, unit, tuple(steps), quantity, level)


def _draw_step(rng: random.Random, left: int, rules: Level) -> Step:
    """A step whose result is a positive integer within the level's bound."""
    possible = _possible_operands(left, rules)
    operator = rng.choice([operator for operator in rules.operators if possible[operator]])
    right = rng.choice(possible[operator])
    return Step(left, operator, right, apply_operator(left, operator, right))


def _possible_operands(left: int, rules: Level) -> dict[str, list[int]]:
    operands = range(2, rules.largest_operand + 1)
    return {
        "+": [n for n in operands if left + n <= rules.largest_result],
        "-": [n for n in operands if left - n >= 1],
        "*": [n for n in _FACTORS if left * n <= rules.largest_result],
        "/": [n for n in _FACTORS if left % n == 0],
    }


def apply_operator(left: int, operator: str, right: int) -> int:
    """`left operator right`; a division must be exact."""
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/" if left % right == 0:
            return left // right
    raise ValueError(f"no integer result: {left} {operator} {right}")
