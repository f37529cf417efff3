import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.grading import (
    NO_BOX,
    TOO_LONG,
    Grader,
    final_answer,
    grader_version,
    last_box,
)

PAPER = Grader("paper")


@pytest.fixture(scope="module")
def grader():
    with Grader() as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "correct", "reason"),
    [
        (r"so \boxed{\frac{2}{4}}", True, "correct"),
        (r"so \boxed{0.6}", False, "wrong"),
        ("so 0.5", False, "no box"),
    ],
)
def test_one_line_grades_a_text_without_a_context_manager(text, correct, reason):
    """The library call that other programs rely on."""
    verdict = Grader().grade(text, "0.5", "number")
    assert (verdict.correct, verdict.reason) == (correct, reason)


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


def quadratic_last_box(text):
    """From every opening, last first, the depth is counted anew."""
    for start in range(len(text) - len("boxed{"), 0, -1):
        if not text.startswith("\\boxed{", start - 1):
            continue
        depth, position = 1, start + len("boxed{")
        inside = position
        while position < len(text):
            if text[position] == "\\":
                position += 1
            elif text[position] in "{}":
                depth += 1 if text[position] == "{" else -1
                if depth == 0:
                    return text[inside:position].strip()
            position += 1
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "1", " ", "\\frac"]), max_size=14).map("".join))
def test_last_box_equals_counting_from_every_opening(text):
    assert last_box(text) == quadratic_last_box(text)


def test_a_text_of_many_opening_braces_is_fast():
    started = time.process_time()
    assert final_answer("\\boxed{" * 30_000) is None
    assert time.process_time() - started < 2.0


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
def test_both_graders_agree_on_plain_cases(box, gold, kind, correct, grader):
    for one in (grader, PAPER):
        assert one.grade(f"Thus \\boxed{{{box}}}.", gold, kind).correct is correct


def test_math_verify_sees_equality_that_plain_rules_miss(grader):
    text, gold = r"\boxed{x^2+2x+1}", "(x+1)^2"
    assert grader.grade(text, gold, "expression").correct
    assert not PAPER.grade(text, gold, "expression").correct


def test_letters_are_not_compared_as_mathematics(grader):
    assert not grader.grade(r"\boxed{A+0}", "A", "letter").correct


@pytest.mark.parametrize(
    ("box", "gold", "correct"),
    [
        # intervals, sets, tuples
        (r"(-\infty,2) \cup (3, +\infty)", r"(-\infty, 2)\cup(3,\infty)", True),
        ("[1,2)", "[1, 2)", True),
        ("(1,2)", "[1,2]", False),
        (r"\{2, 1\}", r"\{1,2\}", True),
        ("2, 1", "1,2", True),
        (r"(100,\,200)", "(100,200)", True),
        (r"(3,\ 100)", "(3,100)", True),
        (r"\{1,\,200\}", r"\{1,200\}", True),
        (r"[1,\;500]", "[1,500]", True),
        (r"\frac{1}{2},\ 100", r"100, \frac12", True),
        (r"(100,\,201)", "(100,200)", False),
        (r"1,\,200", "1200", False),
        (r"1-\sqrt{19}, 1+\sqrt{19}", r"1 \pm \sqrt{19}", True),
        ("(2,1)", "(1,2)", False),
        ("5", "5, 6", False),
        ("5, 6", "5", False),
        (r"\varnothing", r"\emptyset", True),
        # matrices
        (r"\begin{bmatrix} 1 \\ \frac{4}{2} \end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False),
        # per cent, money, units, groups of digits
        (r"10\%", "10", True),
        ("10", r"10\%", True),
        (r"75\%", r"\frac{3}{4}", True),
        (r"-12.5\%", "-12.5", True),
        ("1.25", r"1.25\%", True),
        (r"12\%", r"13\%", False),
        (r"\$32,\!348", "32348", True),
        (r"5\,\text{cm}", "5", True),
        ("5", r"5\text{ cm}", True),
        (r"864\text{ in}^2", r"864 \mbox{ inches}^2", True),
        ("90", r"90^\circ", True),
        (r"10\,080", "10,080", True),
        (r"3.5 \times 10^{6}", "3500000", True),
        # words
        ("evelyn", r"\text{Evelyn}", True),
        (r"\mathrm{No solution.}", r"\text{no solution}", True),
        (r"\text{seat}", r"\text{east}", False),
        ("seat", "east", False),  # no product of letters
        ("odd", r"\text{even}", False),
        (r"\text{(A)}", "A", True),
        # numbers in a base
        ("4210_{5}", "4210_5", True),
        ("4210", "4210_5", True),
        ("4210_6", "4210_5", False),
        # layout around the whole
        (r"\(\dfrac{1}{2}\).", "0.5", True),
        ("{5}.", "5", True),
        ("", "5", False),
        ("0.333", r"\frac13", False),
    ],
)
def test_forms_of_answers(box, gold, correct, grader):
    assert grader.grade(f"Thus \\boxed{{{box}}}", gold, "expression").correct is correct


def test_the_papers_rule_takes_the_last_box_of_the_whole_text(grader):
    unfinished = "<think> so \\boxed{5}, but wait"
    assert PAPER.grade(unfinished, "5", "number").correct
    assert not grader.grade(unfinished, "5", "number").correct


def test_the_version_of_a_grader_names_what_verdicts_depend_on():
    assert grader_version("math_verify")["math-verify"] == "0.9.0"
    assert set(grader_version("paper")) == {"grader", "rules"}


def test_unknown_grader_is_refused():
    with pytest.raises(EvaluationError, match="known graders: math_verify, paper"):
        Grader("exact")


def test_very_long_answers_are_listed_and_not_parsed(grader):
    assert grader.grade("\\boxed{" + "1" * 50_000 + "}", "5", "number").reason == TOO_LONG


def test_grading_a_pair_twice_asks_the_verifier_once(grader, monkeypatch):
    calls = []
    monkeypatch.setattr(grader._verifier, "equal", lambda *pair: calls.append(pair) or True)
    for _ in range(3):
        assert grader.grade(r"\boxed{1234567}", "7654321", "number").correct
    assert len(calls) == 1
