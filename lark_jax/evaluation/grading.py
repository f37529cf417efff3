"""Grades generated texts: `Grader().grade(text, gold, kind)` returns a verdict with `.correct` and `.reason`.

The answer is the content of the last `\\boxed{}` after the thinking block; a text without one is wrong. Letters, words
and numbers in an explicit base are compared here, everything else by math-verify. The grader "paper" applies the
paper's plain rules (C.4) instead: the last `\\boxed{}` of the whole text, compared as strings.
"""

import re
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.spelling import choice_letter, equal_by_paper_rules, in_base, tidy, without_percent, words
from lark_jax.evaluation.verifier import LIMIT_S, MathVerifier, VerifierFailure, VerifierTimeout, package_versions

GRADERS = ("math_verify", "paper")
RULES = 3  # increase when a verdict of this module or its helpers changes: finished students are then graded again
MAX_ANSWER_CHARACTERS = 4_096  # a longer box is a model that repeats itself
THOUGHT = "<think>"  # opens the thinking block

CORRECT = "correct"
WRONG = "wrong"
NO_BOX = "no box"
TIMED_OUT = "timed out"
TOO_LONG = "answer too long"
FAILED = "grader failed"
UNGRADED = (TIMED_OUT, TOO_LONG, FAILED)  # could not be compared; the sample counts as wrong and is listed

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace does not count


@dataclass(frozen=True)
class Verdict:
    correct: bool
    extracted: str | None  # the content of the box; None without one
    reason: str  # CORRECT, WRONG, NO_BOX or one of UNGRADED


class Grader:
    """Grades texts. math-verify runs in a child process, which starts at the first comparison that needs it.

    As a context manager it ends that process at the end of the block; otherwise the process ends with the grader. Equal
    pairs of gold and answer are compared once. A verdict depends on these two only, not on earlier comparisons or on
    the load of the machine.
    """

    def __init__(self, name: str = "math_verify", limit_s: float = LIMIT_S) -> None:
        if name not in GRADERS:
            raise EvaluationError(f"grader {name!r} is unknown; known graders: {', '.join(GRADERS)}")
        self._name = name
        self._verifier = MathVerifier(limit_s)
        self._reasons: dict[tuple[str, str, str], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._verifier.__exit__(kind, error, traceback)

    def grade(self, text: str, gold: str, kind: str) -> Verdict:
        """Grades a whole generated text, including its thinking block from `<think>` on.

        Args:
          gold: the expected answer.
          kind: "number", "letter" or "expression".
        """
        extracted = last_box(text) if self._name == "paper" else final_answer(text)
        if extracted is None:
            return Verdict(False, None, NO_BOX)
        if len(extracted) > MAX_ANSWER_CHARACTERS:
            return Verdict(False, extracted, TOO_LONG)
        key = (gold, extracted, kind)
        if key not in self._reasons:
            self._reasons[key] = self._reason(*key)
        return Verdict(self._reasons[key] == CORRECT, extracted, self._reasons[key])

    def _reason(self, gold: str, answer: str, kind: str) -> str:
        if self._name == "paper":
            return CORRECT if equal_by_paper_rules(gold, answer, kind) else WRONG
        if kind == "letter":
            letter = choice_letter(answer)
            return CORRECT if letter is not None and letter == choice_letter(gold) else WRONG
        return self._compare(tidy(gold), tidy(answer))

    def _compare(self, gold: str, answer: str) -> str:
        if gold == answer:
            return CORRECT
        for same_by in (words, in_base):
            expected, found = same_by(gold), same_by(answer)
            if expected is not None and found is not None:
                return CORRECT if expected == found else WRONG
        bare = without_percent(gold), without_percent(answer)
        pairs = [(gold, answer)] + ([bare] if (gold == bare[0]) != (answer == bare[1]) else [])
        try:
            equal = any(self._verifier.equal(*(f"\\boxed{{{text}}}" for text in pair)) for pair in pairs)
        except VerifierTimeout:
            return TIMED_OUT
        except VerifierFailure:
            return FAILED
        return CORRECT if equal else WRONG


def grader_version(name: str) -> dict[str, object]:
    """What this grader's verdicts depend on besides the answers; recorded, so that outdated results are noticed."""
    packages = package_versions() if name == "math_verify" else {}
    return {"grader": name, "rules": RULES, **packages}


def final_answer(text: str) -> str | None:
    """The content of the last complete `\\boxed{}` after the thinking block, stripped; None without one.

    The thinking block ends with the last `</think>`; if it is opened and never closed, there is no answer.
    """
    answer_part = text.rpartition("</think>")[2]
    return None if THOUGHT in answer_part else last_box(answer_part)


def last_box(text: str) -> str | None:
    """The content of the last complete `\\boxed{}`, stripped; None without one."""
    openings = {box.end() - 1 for box in _BOX.finditer(text)}  # positions of their braces
    unclosed: list[int] = []
    last: tuple[int, int] | None = None
    for match in _BRACE.finditer(text) if openings else ():
        if match.group() == "{":
            unclosed.append(match.start())
        elif match.group() == "}" and unclosed:
            opening = unclosed.pop()
            if opening in openings and (last is None or opening > last[0]):
                last = (opening, match.start())
    return None if last is None else text[last[0] + 1 : last[1]].strip()
