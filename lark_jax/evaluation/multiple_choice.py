"""GPQA's records (a question, the correct answer, three incorrect ones) -> a problem with lettered options.

Options are shuffled by a seed of the problem's own, which is recorded with it: every student sees the same order, on
every machine, whatever else is in the file.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from lark_jax.errors import EvaluationError

_QUESTION, _CORRECT = "Question", "Correct Answer"  # as the published files call them
_INCORRECT = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
LETTERS = "ABCD"


def is_multiple_choice(record: Any) -> bool:
    return isinstance(record, Mapping) and _QUESTION in record and _CORRECT in record


def with_lettered_options(where: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with `problem`, `answer` (a letter), `kind`, `options_seed`, and GPQA's `Record ID` as `id`.

    Raises:
      EvaluationError: names record and field.
    """
    question, *options = (_text(where, record, name) for name in (_QUESTION, _CORRECT, *_INCORRECT))
    seed = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big")
    order = shuffled(len(options), seed)
    lines = [f"({letter}) {options[option]}" for letter, option in zip(LETTERS, order, strict=True)]
    known_id = {"id": record["Record ID"]} if record.get("Record ID") else {}
    return {
        "problem": question + "\n\n" + "\n".join(lines),
        "answer": LETTERS[order.index(0)],
        "kind": "letter",
        "options_seed": seed,
        **known_id,
    }


def shuffled(count: int, seed: int) -> list[int]:
    """An order of 0 .. count - 1: by hash, since the algorithms of random number generators change with versions."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())


def _text(where: str, record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f"{where}: field {name!r} must be a text that is not empty, got {value!r}")
    return value.strip()
