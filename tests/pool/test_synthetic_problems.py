"""Problems: the solution is right, splits share no text, equal seeds give equal problems."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.errors import ConfigError
from lark_jax.pool.synthetic.problems import LEVELS, SPLITS, Problem, generate_problems, split_of

seeds = st.integers(0, 2**32)
splits = st.sampled_from(SPLITS)


@given(seeds, splits)
def test_steps_chain_from_the_story_to_the_answer(seed: int, split: str) -> None:
    for problem in generate_problems(seed, 10, split):
        numbers = [int(digits) for digits in re.findall(r"\d+", problem.text)]
        assert numbers == [problem.steps[0].left, *(step.right for step in problem.steps)]
        quantity = numbers[0]
        for step in problem.steps:
            assert step.left == quantity
            quantity = step.result
            assert eval(f"{step.left} {step.operator} {step.right}") == step.result  # Python as the reference
        assert problem.answer == quantity > 0


@given(seeds, splits)
def test_levels_keep_their_bounds(seed: int, split: str) -> None:
    for problem in generate_problems(seed, 10, split):
        level = LEVELS[problem.level - 1]
        assert len(problem.steps) == level.num_steps
        assert max(step.result for step in problem.steps) <= level.largest_result
        assert {step.operator for step in problem.steps} <= set(level.operators)


@pytest.mark.parametrize("split", ["pool", "test"])
def test_pool_and_test_hold_every_level_equally_often(split: str) -> None:
    assert Counter(problem.level for problem in generate_problems(1, 100, split)) == dict.fromkeys(range(1, 6), 20)


def test_pretraining_holds_every_level_and_the_easy_ones_more_often() -> None:
    counts = Counter(problem.level for problem in generate_problems(1, 100, "pretrain"))
    shares = [counts[level] for level in range(1, 6)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1] > 0


def test_levels_get_harder() -> None:
    def difficulty(level: int) -> tuple[int, int, int]:
        rules = LEVELS[level - 1]
        return rules.num_steps, rules.largest_operand, rules.largest_result

    assert all(a < b for a, b in zip(map(difficulty, range(1, 5)), map(difficulty, range(2, 6)), strict=True))


@pytest.mark.parametrize("seed", [0, 42])
def test_splits_share_no_text_and_repeat_none(seed: int) -> None:
    # Different seeds per split: disjointness must not depend on how the splits were drawn.
    texts = {
        split: [problem.text for problem in generate_problems(seed + offset, 400, split)]
        for offset, split in enumerate(SPLITS)
    }
    everything = [text for split in SPLITS for text in texts[split]]
    assert len(set(everything)) == len(everything) == 1200
    for split in SPLITS:
        assert {split_of(text) for text in texts[split]} == {split}


def test_a_longer_request_starts_with_the_shorter_one() -> None:
    assert generate_problems(7, 60, "pool")[:25] == generate_problems(7, 25, "pool")


def test_seeds_give_different_problems() -> None:
    def texts(problems: tuple[Problem, ...]) -> set[str]:
        return {problem.text for problem in problems}

    first, second = (texts(generate_problems(seed, 50, "test")) for seed in (1, 2))
    assert len(first & second) < 10


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pretrain, pool, test.*'train'"):
        generate_problems(0, 1, "train")


def test_a_split_that_is_used_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lark_jax.pool.synthetic.problems._NAMES", ("Ana",))
    monkeypatch.setattr("lark_jax.pool.synthetic.problems._UNITS", ("eggs",))
    monkeypatch.setattr("lark_jax.pool.synthetic.problems._MOST_DRAWS", 2_000)
    with pytest.raises(ConfigError, match=r"config\.synthetic: the test split has no more problems of level 1"):
        generate_problems(0, 1_000, "test")
