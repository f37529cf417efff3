"""Benchmark files -> problems with string answers, and the messages that ask a student to solve one.

A file is a JSON list or JSON lines of records with `problem` and `answer`; optional are an id (`problem_id`,
`unique_id` or `id`), `level` and `kind`. The public files of MATH-500, AIME and AMC load as they are.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lark_jax.errors import EvaluationError
from lark_jax.files import sha256_of_json
from lark_jax.pool.records import Message

KINDS = ("number", "letter", "expression")
ID_FIELDS = ("problem_id", "unique_id", "id")

# One text per kind of answer, as in Appendix C.4 of the paper: English, reasoning first, then one boxed answer.
_SYSTEM_PROMPT = (
    "You solve problems carefully. Write everything in English. Reason first, as long as you need. "
    "When you are done, write \\boxed{%s} alone on a new last line, %s"
)
BY_KIND: Mapping[str, str] = MappingProxyType(
    {
        "number": _SYSTEM_PROMPT % ("<number>", "with nothing but the final number inside the box."),
        "letter": _SYSTEM_PROMPT % ("<letter>", "with nothing but the letter of the right choice inside the box."),
        "expression": _SYSTEM_PROMPT % ("<answer>", "with nothing but the final answer inside the box."),
    }
)


@dataclass(frozen=True)
class BenchmarkProblem:
    problem_id: str
    problem: str
    answer: str  # gold, as text
    kind: str  # of the answer, one of KINDS
    level: str | None = None


@dataclass(frozen=True)
class Benchmark:
    name: str  # file name without its ending
    problems: tuple[BenchmarkProblem, ...]  # in file order, ids unique
    fingerprint: str  # of everything above


def read_benchmark(path: str | Path) -> Benchmark:
    """Reads a JSON list or JSON lines.

    A record's `kind` says what its answer is. In a file that names no kind at all the answers decide together:
    all plain numbers -> "number", all single capital letters -> "letter", else "expression" (so AIME and AMC are
    asked and graded as numbers, MATH-500 as expressions). Numeric golds become text: 142.0 -> "142".

    Raises:
      EvaluationError: names file, line or record, and field.
    """
    path = Path(path)
    located = _read_records(path)
    if not located:
        raise EvaluationError(f"{path}: no problems in this file")
    default_kind = _common_kind(located)
    problems = tuple(
        _problem_from_record(where, record, str(index), default_kind) for index, (where, record) in enumerate(located)
    )
    seen: dict[str, str] = {}
    for (where, _), problem in zip(located, problems, strict=True):
        if problem.problem_id in seen:
            first = seen[problem.problem_id]
            raise EvaluationError(f"{where}: id {problem.problem_id!r} was used before, at {first}; ids must be unique")
        seen[problem.problem_id] = where
    return Benchmark(path.stem, problems, sha256_of_json([path.stem, [asdict(problem) for problem in problems]]))


def load_system_prompts(choice: str) -> Mapping[str, str]:
    """Kind -> system prompt for `evaluate.system_prompts`: "by_kind" (built in), "none", or a JSON file {kind: text}.

    Raises:
      EvaluationError: the file is missing, is not an object of texts, or names an unknown kind.
    """
    if choice == "by_kind":
        return BY_KIND
    if choice == "none":
        return MappingProxyType({})
    path = Path(choice)
    prompts = _parse_json(_read_text(path), str(path))
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise EvaluationError(f"{path}: expected one JSON object of texts, {{kind: system prompt}}")
    for kind in prompts:
        if kind not in KINDS:
            raise EvaluationError(f"{path}: unknown kind {kind!r}; known kinds: {', '.join(KINDS)}")
    return MappingProxyType(prompts)


def prompt_messages(problem: BenchmarkProblem, system_prompts: Mapping[str, str]) -> tuple[Message, ...]:
    """The conversation that the student continues; without a system turn where its kind has no prompt."""
    user = Message("user", problem.problem)
    if problem.kind not in system_prompts:
        return (user,)
    return (Message("system", system_prompts[problem.kind]), user)


def _read_records(path: Path) -> list[tuple[str, Any]]:
    """(where, record) pairs; `where` is "file:line" for JSON lines and "file, record N" for a list."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        return [(f"{path}, record {index}", record) for index, record in enumerate(_parse_json(text, str(path)), 1)]
    lines = enumerate(text.split("\n"), 1)
    return [(f"{path}:{number}", _parse_json(line, f"{path}:{number}")) for number, line in lines if line.strip()]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not valid JSON ({error})") from error


def _problem_from_record(where: str, record: Any, default_id: str, default_kind: str) -> BenchmarkProblem:
    problem = _field(where, record, "problem")
    if not isinstance(problem, str) or not problem.strip():
        raise EvaluationError(f"{where}: field 'problem' must be a text that is not empty, got {problem!r}")
    kind = record.get("kind", default_kind)
    if kind not in KINDS:
        raise EvaluationError(f"{where}: field 'kind' must be one of {', '.join(KINDS)}, got {kind!r}")
    level = record.get("level")
    return BenchmarkProblem(
        problem_id=_problem_id(where, record, default_id),
        problem=problem,
        answer=_answer_text(where, record),
        kind=kind,
        level=None if level is None else str(level),
    )


def _problem_id(where: str, record: Mapping[str, Any], default: str) -> str:
    for name in ID_FIELDS:
        if name in record:
            value = record[name]
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                raise EvaluationError(f"{where}: field {name!r} must be a text or an integer, got {value!r}")
            return str(value)
    return default


def _field(where: str, record: Any, name: str) -> Any:
    if not isinstance(record, Mapping):
        raise EvaluationError(f"{where}: expected an object with 'problem' and 'answer', got {record!r}")
    if name not in record:
        raise EvaluationError(f"{where}: field {name!r} is missing")
    return record[name]


def _answer_text(where: str, record: Any) -> str:
    answer = _field(where, record, "answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(int(answer) if answer == int(answer) else answer)
    if isinstance(answer, str) and answer.strip():
        return answer.strip()
    raise EvaluationError(f"{where}: field 'answer' must be a number or a text that is not empty, got {answer!r}")


def _common_kind(located: list[tuple[str, Any]]) -> str:
    if any(isinstance(record, Mapping) and "kind" in record for _, record in located):
        return "expression"
    answers = [_answer_text(where, record) for where, record in located]
    if all(re.fullmatch(r"[-+]?\d+(\.\d+)?", answer) for answer in answers):
        return "number"
    if all(re.fullmatch(r"[A-Z]", answer) for answer in answers):
        return "letter"
    return "expression"
