"""Teachers: every answer is right and boxed once, and the styles differ in length and in vocabulary."""

import random
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.pool.synthetic.problems import Problem, generate_problems
from lark_jax.pool.synthetic.teachers import TEACHERS, plain, rollouts

BOX = re.compile(r"\\boxed\{([^}]*)\}")
# An equation in infix notation with a check mark of its own: Python evaluates the left side.
EQUATION = re.compile(r"(\d+[-+*/]\d+)=(\d+)")
POSTFIX = re.compile(r"(\d+) (\d+) ([⊕⊖⊗⊘]).[⇒↦⊢](\d+)")


@pytest.fixture(scope="module")
def problems() -> tuple[Problem, ...]:
    return generate_problems(3, 200, "pool")


def answers_of(problems: tuple[Problem, ...], teacher: str, seed: int = 0, count: int = 3) -> list[str]:
    return [answer for problem in problems for answer in rollouts(problem, teacher, count, seed)]


@pytest.mark.parametrize("teacher", TEACHERS)
@given(seed=st.integers(0, 2**32))
def test_every_answer_boxes_the_result_once_at_its_end(teacher: str, seed: int) -> None:
    for problem in generate_problems(seed, 10, "pool"):
        for answer in rollouts(problem, teacher, 3, seed):
            assert BOX.findall(answer) == [str(problem.answer)]
            assert re.search(r"\\boxed\{\d+\}\.?$", answer)


@pytest.mark.parametrize("teacher", ["terse", "verbose", "checking"])
def test_every_equation_of_the_flawless_teachers_holds(teacher: str, problems: tuple[Problem, ...]) -> None:
    for answer in answers_of(problems, teacher):
        equations = EQUATION.findall(answer)
        assert equations
        assert all(eval(left) == int(right) for left, right in equations)


def test_every_postfix_line_of_the_unfamiliar_notation_holds(problems: tuple[Problem, ...]) -> None:
    operators = {"⊕": "+", "⊖": "-", "⊗": "*", "⊘": "/"}
    for problem in problems:
        for answer in rollouts(problem, "notation", 3, seed=1):
            lines = POSTFIX.findall(answer)
            assert len(lines) == len(problem.steps)
            assert all(eval(f"{a}{operators[glyph]}{b}") == int(result) for a, b, glyph, result in lines)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_explorer_errs_once_or_twice_and_corrects_each_error(seed: int, problems: tuple[Problem, ...]) -> None:
    for problem in problems:
        for answer in rollouts(problem, "exploring", 3, seed):
            guesses = re.findall(r"Maybe (\d+[-+*/]\d+)=(\d+)\?", answer)
            claims = EQUATION.findall(answer)
            false_claims = [claim for claim in claims if eval(claim[0]) != int(claim[1])]
            assert 1 <= len(guesses) <= 2
            assert false_claims == guesses  # nothing but the guesses is false
            for left, _ in guesses:
                assert (left, str(int(eval(left)))) in claims


@pytest.mark.parametrize("teacher", TEACHERS)
def test_rollouts_of_a_problem_differ(teacher: str, problems: tuple[Problem, ...]) -> None:
    for problem in problems:
        assert len(set(rollouts(problem, teacher, 3, seed=9))) == 3


def test_another_seed_words_the_answers_differently(problems: tuple[Problem, ...]) -> None:
    for teacher in TEACHERS:
        assert answers_of(problems[:20], teacher, seed=1) != answers_of(problems[:20], teacher, seed=2)


def test_styles_differ_in_length(problems: tuple[Problem, ...]) -> None:
    median = {teacher: statistics.median(map(len, answers_of(problems, teacher))) for teacher in TEACHERS}
    assert median["terse"] * 1.5 < median["checking"]
    assert median["notation"] * 1.5 < median["verbose"]
    assert median["checking"] * 1.2 < median["exploring"]


def test_styles_differ_in_vocabulary(problems: tuple[Problem, ...]) -> None:
    """Answers can be told apart by their words and signs: at most half of any two styles' words are shared."""
    words = {
        teacher: set(re.findall(r"[A-Za-z]{2,}|[^\sA-Za-z\d]", " ".join(answers_of(problems, teacher))))
        for teacher in TEACHERS
    }
    for one in TEACHERS:
        for other in TEACHERS:
            if one != other:
                assert len(words[one] & words[other]) / len(words[one] | words[other]) <= 0.5, (one, other)


def test_the_unfamiliar_signs_appear_in_no_other_style(problems: tuple[Problem, ...]) -> None:
    unfamiliar = {sign for sign in "".join(answers_of(problems, "notation")) if not sign.isascii()}
    assert {"⊕", "∎"} <= unfamiliar
    for teacher in TEACHERS:
        if teacher != "notation":
            assert "".join(answers_of(problems, teacher)).isascii()


@given(seed=st.integers(0, 2**32))
def test_the_plain_style_is_right_too(seed: int) -> None:
    for problem in generate_problems(seed, 10, "pretrain"):
        answer = plain(problem, random.Random(seed))
        assert BOX.findall(answer) == [str(problem.answer)]
        assert all(eval(left) == int(right) for left, right in EQUATION.findall(answer))
