"""Spellings of one answer become one; differences remain. The paper's plain rules."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.evaluation.spelling import (
    choice_letter,
    equal_by_paper_rules,
    in_base,
    normalize_expression,
    number_value,
    tidy,
    words,
)


@pytest.mark.parametrize(
    ("spelling", "tidied"),
    [
        ("5", "5"),
        ("5.", "5"),
        (" \\, 5 \\; ", "5"),
        ("$5$", "5"),
        ("\\(5.\\)", "5"),
        ("\\[ x \\]", "x"),
        ("$$5$$", "5"),
        ("{$5.$}", "5"),
        ("{{5}}", "5"),
        ("{1}{2}", "{1}{2}"),
        ("$1$ and $2$", "$1$ and $2$"),
        ("\\displaystyle \\frac{1}{2}", "\\frac{1}{2}"),
        ("\\text{1.25}", "1.25"),
        ("\\text{five}", "\\text{five}"),
        ("10\\,080", "10080"),
        ("11,\\! 111,\\! 111", "11111111"),
        ("10{,}080.5", "10080.5"),
        ("1~000~000", "1000000"),
        ("10 080", "10080"),
        ("1, 234", "1, 234"),  # two numbers
        ("(100,\\,200)", "(100,\\,200)"),
        ("1,\\ 234", "1,\\ 234"),
        ("1\\;,\\:234", "1\\;,\\:234"),
        ("1,~234", "1, 234"),
        ("(1\\,000,\\,200\\ 000)", "(1000,\\,200000)"),
        ("1\\!,234", "1234"),
        ("1 , \\! 234", "1234"),
        ("1,234", "1,234"),  # math-verify knows
        ("12\\,34", "12\\,34"),
        ("0.123 456", "0.123 456"),
        ("1000 200", "1000 200"),
        ("\\varnothing", "\\emptyset"),
        ("a...", "a..."),
        ("\\left\\{ x \\right.", "\\left\\{ x \\right."),
        ("\\{1\\}", "\\{1\\}"),
        ("\\", "\\"),
        ("", ""),
        ("$", "$"),
    ],
)
def test_marks_without_value_are_removed_and_others_kept(spelling, tidied):
    assert tidy(spelling) == tidied


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("\\text{Evelyn}", "evelyn"),
        ("Evelyn", "evelyn"),
        ("\\mathrm{ No  Solution. }", "no solution"),
        ("no solution", "no solution"),
        ("abc", None),  # may be a product
        ("\\text{no}", "no"),
        ("x+y", None),
        ("\\text{9:30 a.m.}", None),
        ("\\pi", None),
        ("", None),
        ("\\text{}", None),
    ],
)
def test_words_are_texts_and_long_runs_of_letters(answer, expected):
    assert words(answer) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(b)", "B"), ("B.", "B"), (r"\text{C}", "C"), (r"\textbf{(D)}", "D"), ("$a$", "A"), ("BC", None)],
)
def test_choice_letter_accepts_usual_spellings_only(text, letter):
    assert choice_letter(text) == letter


def test_a_base_belongs_to_a_number():
    assert in_base("4210_5") == in_base("4210_{5}") == ("4210", "5")
    assert in_base("11_7") != in_base("11_6")
    assert in_base("4210") is None
    assert in_base("2x_1") != in_base("2x_2")


@pytest.mark.parametrize(
    "piece", [" ", "~", "\\,", "\\!", " \\!", "1 ", "100 ", "{", "$", "{,}", "1, ", "\\text{", "\\quad ", "."]
)
def test_no_answer_of_allowed_length_takes_long(piece):
    started = time.process_time()
    for text in (piece * (4_096 // len(piece)), "1" + piece * (4_000 // len(piece)) + "x"):
        tidy(text)
        words(text)
        in_base(text)
    assert time.process_time() - started < 2.0


@given(st.integers(-(10**6), 10**6), st.integers(1, 999))
def test_paper_numbers_compare_by_value(numerator, denominator):
    assert equal_by_paper_rules(f"{2 * numerator}/{2 * denominator}", f" {numerator}/{denominator} ", "number")
    assert number_value(f"{numerator}.50") == number_value(f"{numerator}.5")
    assert not equal_by_paper_rules(f"{numerator}/{denominator}", f"{numerator + 1}/{denominator}", "number")


@pytest.mark.parametrize(
    "variants",
    [
        (r"\frac{3}{4}", r"\tfrac34", r"\dfrac{3}{4}", "3/4", r"\frac3{4}", r"\frac{3}4", r"$\frac{3}{4}$"),
        (r"5", r"5 \text{ cm}", r"5\%", r"5^\circ", r"\$5", "x = 5", "5."),
        (r"x^{2}", "x^2", " x ^ 2"),
        (r"0.25", ".25"),
    ],
)
def test_paper_expressions_have_one_spelling(variants):
    assert len({normalize_expression(variant) for variant in variants}) == 1
