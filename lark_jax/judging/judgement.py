"""A judge's answer as text -> its scores, or the reason why it is unusable. Nothing is repaired or guessed.

The reasons are told to the judge, so their wording is part of later questions and of the keys of kept answers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CHARACTERS = 200_000  # of an answer that is parsed
SHOWN = 60  # characters of a wrong value in a reason


@dataclass(frozen=True)
class Judgement:
    """What a judge says about one trajectory."""

    overall_score: float  # in [0, 1]
    overall_reason: str
    scores: Mapping[str, float]  # criterion -> score in [0, 1]


class UnusableAnswer(ValueError):
    """Why an answer cannot be used, in words that may be told to the judge."""


def read_judgement(text: str, criteria: Sequence[str]) -> Judgement:
    """Reads exactly one JSON object with exactly the keys of `answer_schema`; white space around it is allowed.

    Raises:
      UnusableAnswer: anything else, a repeated key, a score that is not a number in [0, 1] (booleans, NaN and numbers
        in quotes are not), an empty overall reason.
    """
    answer = _object("the answer", _parsed(text), ("criteria", "overall_reason", "overall_score"))
    entries = _object("criteria", answer["criteria"], criteria)
    scores = {}
    for name in criteria:
        entry = _object(f"criteria.{name}", entries[name], ("reason", "score"))
        _text(f"criteria.{name}.reason", entry["reason"])
        scores[name] = _score(f"criteria.{name}.score", entry["score"])
    reason = _text("overall_reason", answer["overall_reason"])
    if not reason.strip():
        raise UnusableAnswer("overall_reason is empty")
    return Judgement(_score("overall_score", answer["overall_score"]), reason, scores)


def answer_schema(criteria: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of a usable answer, for engines that can enforce it."""
    score = {"type": "number", "minimum": 0, "maximum": 1}
    criterion = _object_schema({"reason": {"type": "string"}, "score": score})
    return _object_schema(
        {
            "criteria": _object_schema(dict.fromkeys(criteria, criterion)),
            "overall_reason": {"type": "string"},
            "overall_score": score,
        }
    )


def _object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _parsed(text: str) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise UnusableAnswer(f"it has {len(text):,} characters")
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except UnusableAnswer:
        raise
    except RecursionError:
        raise UnusableAnswer("it is nested too deeply") from None
    except ValueError as error:  # including numbers of thousands of digits
        raise UnusableAnswer(f"it is not one JSON object and nothing else ({error})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise UnusableAnswer("a key occurs twice in one object")
    return fields


def _refuse_constant(name: str) -> Any:
    raise UnusableAnswer(f"{name} is not a number of JSON")


def _object(where: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnusableAnswer(f"{where} is not an object but {_shown(value)}")
    if missing := [key for key in keys if key not in value]:
        raise UnusableAnswer(f"{where} has no key {missing[0]!r}")
    if unknown := [key for key in value if key not in keys]:
        raise UnusableAnswer(f"{where} has the unknown key {_shown(unknown[0])}")
    return value


def _score(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UnusableAnswer(f"{where} is not a number from 0 to 1 but {_shown(value)}")
    return abs(float(value))  # -0.0 is 0.0


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UnusableAnswer(f"{where} is not a text but {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return f"{value!r:.{SHOWN}}"
