"""Golds of MATH-500 against themselves and against other spellings of the same value."""

import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction

import pytest

from lark_jax.evaluation.grading import Grader
from lark_jax.evaluation.spelling import normalize_expression
from lark_jax.evaluation.verifier import MathVerifier

SAMPLE = 60  # golds drawn in every test run; the slow test uses all 500
NUMBER = re.compile(r"-?\d+(\.\d+)?")
FRACTION = re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}")
WORD = re.compile(r"\\text\{([A-Za-z ]+)\}")
UNITS = (
    "\\text{ cm}", "\\,\\text{cm}", "\\ \\mathrm{cm}", "~\\text{cm}^2", "\\mbox{ cm}", " cm", "\\text{ square units}",
    "^\\circ", "^{\\circ}", " degrees", "\\text{ dollars}", " units", "\\,\\mathrm{m/s}", "\\%",
)  # fmt: skip
THOUSANDS = (",", "{,}", "\\,", ",\\!", "\\!,", " ", "\\;")


@pytest.fixture(scope="module")
def golds(shared_data) -> list[str]:
    lines = (shared_data / "benchmarks" / "math500.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 500
    return answers


def rewrites(gold: str) -> Iterator[str]:
    """Spellings of the same value, among them some equal to `gold`."""
    yield gold.replace("\\frac", "\\dfrac")
    yield gold.replace("\\frac", "\\tfrac")
    yield re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", gold)
    yield re.sub(r"\\sqrt\{(\w)\}", r"\\sqrt\1", gold)
    yield gold.replace("\\text", "\\mathrm")
    yield from (f"  {gold}\\, ", f"{gold}.", f"${gold}$", f"\\({gold}\\)", f"\\displaystyle {gold}", f"{{{gold}}}")
    if "\\text" not in gold and "!" not in gold and not re.search(r"\d,\d{3}", gold):
        yield re.sub(r"([-+=,])", r" \1 ", gold)
    if "\\left" in gold:
        yield gold.replace("\\left", "").replace("\\right", "")
    else:
        yield gold.replace("(", "\\left(").replace(")", "\\right)")
    if NUMBER.fullmatch(gold):
        yield from rewritten_number(gold)
    if match := FRACTION.fullmatch(gold):
        yield from rewritten_fraction(match[1], Fraction(int(match[2]), int(match[3])))
    if match := WORD.fullmatch(gold):
        yield from (match[1], f"\\textbf{{{match[1]}}}", f"\\text{{{match[1].upper()}}}")


def rewritten_number(gold: str) -> Iterator[str]:
    value = Fraction(gold)
    sign = "-" if value < 0 else ""
    yield from (gold + unit for unit in UNITS)
    yield from (f"\\${gold}", f"x = {gold}", f"\\text{{{gold}}}", f"{gold}0" if "." in gold else f"{gold}.0")
    yield f"{sign}\\frac{{{2 * abs(value.numerator)}}}{{{2 * value.denominator}}}"
    if value.denominator == 1 and abs(value) >= 1000:
        yield from (f"{int(value):,}".replace(",", separator) for separator in THOUSANDS)


def rewritten_fraction(sign: str, value: Fraction) -> Iterator[str]:
    yield f"{sign}{value.numerator}/{value.denominator}"
    yield f"{sign}\\frac{{{3 * value.numerator}}}{{{3 * value.denominator}}}"
    if (10**6 * value).denominator == 1:
        yield f"{sign}{float(value)}"
    if value > 1 and value.denominator > 1:
        yield f"{sign}{value // 1}\\frac{{{(value % 1).numerator}}}{{{value.denominator}}}"


def refused(golds: list[str]) -> tuple[int, list[tuple[str, str]]]:
    """The number of rewrites, and those that the grader marks wrong."""
    pairs = [(gold, text) for gold in golds for text in sorted(set(rewrites(gold)) - {gold})]
    with Grader() as grader:
        return len(pairs), [
            (gold, text) for gold, text in pairs if not grader.grade(f"\\boxed{{{text}}}", gold, "expression").correct
        ]


def test_every_gold_equals_itself(golds):
    with Grader() as grader, MathVerifier() as verifier:
        for gold in golds:
            assert grader.grade(f"so \\boxed{{{gold}}}", gold, "expression").correct, gold
            assert verifier.equal(f"\\boxed{{{gold}}}", f"\\boxed{{\\displaystyle {gold}}}"), gold


def test_a_sample_of_golds_equals_its_rewrites(golds):
    count, wrong = refused(random.sample(golds, SAMPLE))
    assert count > 10 * SAMPLE
    assert 1 - len(wrong) / count >= 0.98, wrong


@pytest.mark.slow
def test_golds_equal_their_rewrites(golds):
    count, wrong = refused(golds)
    assert count > 9_000
    assert 1 - len(wrong) / count >= 0.999, wrong


def test_golds_differ_from_one_another(golds):
    """Shifted by one, nearly all pairs are wrong: the grader does not simply accept everything."""
    drawn = random.sample(sorted(set(golds)), SAMPLE)
    with Grader() as grader:
        agreed = sum(
            grader.grade(f"\\boxed{{{answer}}}", gold, "expression").correct
            for gold, answer in zip(drawn, drawn[1:] + drawn[:1], strict=True)
        )
    assert agreed <= 2


def test_normalization_is_idempotent_on_math500_answers(golds):
    for answer in golds:
        once = normalize_expression(answer)
        assert once
        assert normalize_expression(once) == once
