"""From a generated text to right or wrong.

The answer is what stands in the last `\\boxed{}` after the thinking block; a text without one is wrong, whatever else
it says. Letters, words and numbers in a named base are compared here, everything else by math-verify. On request the
paper's plain rules (C.4) decide instead: the last `\\boxed{}` of the whole text, and strings.
"""

import re
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.paper_rules import equal_by_paper_rules
from lark_jax.evaluation.spelling import choice_letter, in_base, tidy, without_percent, words
from lark_jax.evaluation.verifier import LIMIT_S, MathVerifier, VerifierFailure, VerifierTimeout, package_versions

GRADERS = ("math_verify", "paper")
RULES = 3  # raised when a verdict of this module or its helpers changes: finished students are then graded again
MAX_ANSWER_CHARACTERS = 4_096  # beyond, a box holds no answer but a model that repeats itself
THOUGHT = "<think>"  # opens the thinking block

CORRECT = "correct"
WRONG = "wrong"
NO_BOX = "no box"
TIMED_OUT = "timed out"
TOO_LONG = "answer too long"
FAILED = "grader failed"
GAVE_UP = (TIMED_OUT, TOO_LONG, FAILED)  # no verdict; the sample counts as wrong and is listed

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none


@dataclass(frozen=True)
class Grade:
    correct: bool
    extracted: str | None  # what stood in the box; None without one
    reason: str  # CORRECT, WRONG, NO_BOX or one of GAVE_UP


class Grader:
    """Grades texts; a context manager (math-verify lives in a child process while it is open).

    Equal pairs of gold and answer are compared once. A verdict is a function of the two: neither the order of the
    questions nor the load of the machine changes it.
    """

    def __init__(self, name: str = "math_verify", limit_s: float = LIMIT_S) -> None:
        if name not in GRADERS:
            raise EvaluationError(f"grader {name!r} is unknown; known graders: {', '.join(GRADERS)}")
        self._name = name
        self._verifier = MathVerifier(limit_s)
        self._verdicts: dict[tuple[str, str, str], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._verifier.__exit__(kind, error, traceback)

    def grade(self, text: str, gold: str, kind: str) -> Grade:
        """Grades a whole generated text, from the thinking block's `<think>` on where it has one.

        `kind` is "number", "letter" or "expression".
        """
        extracted = last_box(text) if self._name == "paper" else final_answer(text)
        if extracted is None:
            return Grade(False, None, NO_BOX)
        if len(extracted) > MAX_ANSWER_CHARACTERS:
            return Grade(False, extracted, TOO_LONG)
        key = (gold, extracted, kind)
        if key not in self._verdicts:
            self._verdicts[key] = self._verdict(*key)
        return Grade(self._verdicts[key] == CORRECT, extracted, self._verdicts[key])

    def _verdict(self, gold: str, answer: str, kind: str) -> str:
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


def grader_identity(name: str) -> dict[str, object]:
    """What verdicts of this grader depend on besides the answers: with it, results say when they are out of date."""
    packages = package_versions() if name == "math_verify" else {}
    return {"grader": name, "rules": RULES, **packages}


def grade(text: str, gold: str, kind: str, grader: str = "math_verify") -> Grade:
    """Grades one text. For many, keep one `Grader` open: it starts its child process only once."""
    with Grader(grader) as opened:
        return opened.grade(text, gold, kind)


def final_answer(text: str) -> str | None:
    """What stands in the last complete `\\boxed{}` after the thinking block, stripped; None without one.

    The thinking block ends with the last `</think>`; one that is opened and never closed leaves no answer.
    """
    answer_part = text.rpartition("</think>")[2]
    return None if THOUGHT in answer_part else last_box(answer_part)


def last_box(text: str) -> str | None:
    """What stands in the last complete `\\boxed{}`, stripped; None without one."""
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
