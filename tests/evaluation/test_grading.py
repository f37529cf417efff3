import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.grading import (
    CORRECT,
    NO_BOX,
    TIMED_OUT,
    TOO_LONG,
    WRONG,
    Grader,
    choice_letter,
    final_answer,
    grade,
)
from lark_jax.evaluation.paper_rules import equal_by_paper_rules, normalize_expression, number_value
from lark_jax.evaluation.verifier import MathVerifier, VerifierTimeout


@pytest.fixture(scope="module")
def grader():
    with Grader() as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}", "12"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and done", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        (r"\boxed{\left\{ x : x > 0 \right.}", r"\left\{ x : x > 0 \right."),
        (r"\boxed {7}", "7"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{5} and then \boxed{6", "5"),  # a box cut off by the token limit is no box
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{}", ""),
        ("<think>\\boxed{1}</think>\\boxed{2}", "2"),
        ("<think>a</think>\\boxed{1}<think>b</think>\\boxed{2}", "2"),
        ("reasoning of a template that opens the block itself \\boxed{1}</think> \\boxed{2}", "2"),
    ],
)
def test_answer_is_the_last_complete_box_after_the_thinking_block(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "the answer is 12",
        "",
        r"\boxed{12",
        "boxed{12}",
        "<think>\\boxed{1}",
        "<think>\\boxed{1}</think> the answer is 1",
        "\\boxed{1} <think> wait",
    ],
)
def test_no_box_after_the_thinking_block_means_no_answer(text, grader):
    assert final_answer(text) is None
    verdict = grader.grade(text, "1", "expression")
    assert (verdict.correct, verdict.reason) == (False, NO_BOX)


@pytest.mark.parametrize("grader_name", ["math_verify", "paper"])
@pytest.mark.parametrize(
    ("box", "gold", "kind", "correct"),
    [
        ("204", "204", "number", True),
        ("25", "025", "number", True),
        ("142.0", "142", "number", True),
        ("3/4", "0.75", "number", True),
        ("205", "204", "number", False),
        ("", "204", "number", False),
        ("b", "B", "letter", True),
        ("C", "B", "letter", False),
        (r"\dfrac12", r"\frac{1}{2}", "expression", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", "expression", True),
        (r"\sqrt3", r"\sqrt{3}", "expression", True),
        ("x=5", "5", "expression", True),
        ("x+1", "x+2", "expression", False),
        (r"\text{Evelyn}", r"\text{Evelyn}", "expression", True),
        (r"\text{Carla}", r"\text{Evelyn}", "expression", False),
    ],
)
def test_both_graders_agree_on_plain_cases(box, gold, kind, correct, grader_name):
    assert grade(f"Thus \\boxed{{{box}}}.", gold, kind, grader_name).correct is correct


def test_math_verify_sees_equality_that_plain_rules_miss(grader):
    text, gold = r"\boxed{x^2+2x+1}", "(x+1)^2"
    assert grader.grade(text, gold, "expression").correct
    assert not grade(text, gold, "expression", "paper").correct


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(b)", "B"), ("B.", "B"), (r"\text{C}", "C"), (r"\textbf{(D)}", "D"), ("$a$", "A"), ("BC", None)],
)
def test_choice_letter_accepts_usual_spellings_only(text, letter):
    assert choice_letter(text) == letter


def test_letters_are_not_compared_as_mathematics(grader):
    assert not grader.grade(r"\boxed{A+0}", "A", "letter").correct


def test_unknown_grader_is_refused():
    with pytest.raises(EvaluationError, match="known graders: math_verify, paper"):
        Grader("exact")


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


def test_normalization_is_idempotent_on_math500_answers(shared_data):
    lines = (shared_data / "benchmarks" / "math500.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 500
    for answer in answers:
        once = normalize_expression(answer)
        assert once
        assert normalize_expression(once) == once


def test_every_math500_gold_is_correct_in_another_layout(shared_data, grader):
    lines = (shared_data / "benchmarks" / "math500.jsonl").read_text().splitlines()
    golds = [json.loads(line)["answer"] for line in lines]
    wrong = [
        gold for gold in golds if not grader.grade(f"\\boxed{{\\displaystyle {gold} }}", gold, "expression").correct
    ]
    assert wrong == []


def test_verifier_agrees_with_the_published_cases(shared_data):
    cases = json.loads((shared_data / "grader" / "math_verify_cases.json").read_text())
    agreed = 0
    with MathVerifier(deadline_s=60.0) as verifier:
        for case in cases:
            options = {name: case[name] for name in ("strict", "allow_set_relation_comp") if name in case}
            if "precision" in case:
                options["float_rounding"] = case["precision"]
            agreed += verifier.equal(case["gold"], case["pred"], **options) == bool(case["expected"])
    assert agreed / len(cases) >= 0.98  # 252 of 254 with math-verify 0.9.0


def test_a_comparison_that_hangs_in_c_code_is_interrupted_and_the_next_one_works():
    with Grader(deadline_s=1.0) as impatient:
        started = time.monotonic()
        hung = impatient.grade(r"\boxed{9^{9^{9^9}}}", "5", "expression")
        assert time.monotonic() - started < 60.0
        assert (hung.correct, hung.reason) == (False, TIMED_OUT)
        impatient._verifier._deadline_s = 30.0
        assert impatient.grade(r"\boxed{2+3}", "5", "expression").reason == CORRECT


def test_verifier_raises_after_its_process_was_killed_and_recovers():
    with MathVerifier() as verifier:
        assert verifier.equal("$2$", "$2$")
        verifier._child.kill()
        with pytest.raises(VerifierTimeout):
            verifier.equal("$2$", "$3$")
        assert not verifier.equal("$2$", "$3$")


def test_endless_answers_are_listed_not_parsed(grader):
    assert grader.grade("\\boxed{" + "1" * 50_000 + "}", "5", "number").reason == TOO_LONG


def test_random_texts_neither_crash_nor_hang_the_grader():
    pieces = [
        "\\boxed{", "}", "{", "\\frac", "\\sqrt", "^", "_", "$", "\\{", "\\}", "1", "42", ".", ",", "x", "\\pi", "-",
        "+", "=", "<think>", "</think>", "\\left(", "\\right)", "\\text{", " ", "\n", "\\\\", "\\", "!", "é", "答",
        "\U0001f600", "\x00", "∞", "\\begin{pmatrix}", "&", "%", "\\cup", "[", "]",
    ]  # fmt: skip
    rng = random.Random()
    with Grader(deadline_s=3.0) as opened:
        for _ in range(300):
            body = "".join(rng.choices(pieces, k=rng.randrange(12)))
            text = rng.choice([body, f"\\boxed{{{body}}}"])
            verdict = opened.grade(text, "1", rng.choice(["number", "letter", "expression"]))
            assert verdict.reason in (CORRECT, WRONG, NO_BOX, TIMED_OUT), text
            assert verdict.correct == (verdict.reason == CORRECT)


def test_grading_a_pair_twice_asks_the_verifier_once(grader, monkeypatch):
    calls = []
    monkeypatch.setattr(grader._verifier, "equal", lambda *pair: calls.append(pair) or True)
    for _ in range(3):
        assert grader.grade(r"\boxed{1234567}", "7654321", "number").correct
    assert len(calls) == 1
