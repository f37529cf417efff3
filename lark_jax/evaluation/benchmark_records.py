"""Benchmark files -> problems with string answers.

A file is a JSON list, JSON lines, parquet or CSV. A record has `problem` and `answer`, optionally an id (`problem_id`,
`unique_id` or `id`), `level` and `kind`.

Records in GPQA's published form (a question, the correct answer, three incorrect ones) become problems with lettered
options. The options are shuffled with a seed that depends on the question only and is recorded with the problem: every
student sees the same order, on every machine and in every file.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lark_jax.errors import EvaluationError, one_line
from lark_jax.evaluation.spelling import choice_letter
from lark_jax.runtime.files import sha256_of_json

KINDS = ("number", "letter", "expression")
READING = 2  # increase when the same file gives other problems or golds
FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv")
ID_FIELDS = ("problem_id", "unique_id", "id")
LETTERS = "ABCD"
_QUESTION, _CORRECT = "Question", "Correct Answer"  # field names of GPQA's published files
_INCORRECT = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@dataclass(frozen=True)
class BenchmarkProblem:
    problem_id: str
    problem: str
    answer: str  # gold, as text; a single capital letter for kind "letter"
    kind: str  # of the answer, one of KINDS
    level: str | None = None
    options_seed: int | None = None  # with which the options of a multiple-choice problem were shuffled


@dataclass(frozen=True)
class Benchmark:
    name: str
    problems: tuple[BenchmarkProblem, ...]  # in file order, ids unique
    fingerprint: str  # of everything above


def read_records(path: Path, name: str) -> Benchmark:
    """Reads the file as the benchmark `name`.

    A record's `kind` is the kind of its answer. In a file without any `kind` it follows from all answers together: all
    plain numbers -> "number", all single capital letters -> "letter", else "expression" (so AIME and AMC are asked and
    graded as numbers, MATH-500 as expressions). Numeric golds become text: 142.0 -> "142".

    Raises:
      EvaluationError: names file, line or record, and field.
    """
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
    return Benchmark(name, problems, sha256_of_json([name, [asdict(problem) for problem in problems]]))


def _read_records(path: Path) -> list[tuple[str, Any]]:
    """(where, record) pairs; `where` is "file:line" for JSON lines and "file, record N" otherwise."""
    located = _read_table(path) if path.suffix in (".parquet", ".csv") else _read_json(path)
    return [
        (where, _with_lettered_options(where, record) if _is_multiple_choice(record) else record)
        for where, record in located
    ]


def _read_table(path: Path) -> list[tuple[str, Any]]:
    try:
        if path.suffix == ".parquet":
            records = pq.read_table(path).to_pylist()
        else:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                records = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise EvaluationError(f"{path}: cannot be read as {path.suffix[1:]} ({one_line(error)})") from error
    return [(f"{path}, record {index}", _given(record)) for index, record in enumerate(records, 1)]


def _given(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without its empty cells, since every row of a table has every column."""
    return {name: value for name, value in record.items() if value is not None and value != ""}


def _read_json(path: Path) -> list[tuple[str, Any]]:
    text = read_text(path)
    if text.lstrip().startswith("["):
        return [(f"{path}, record {index}", record) for index, record in enumerate(parse_json(text, str(path)), 1)]
    lines = enumerate(text.split("\n"), 1)
    return [(f"{path}:{number}", parse_json(line, f"{path}:{number}")) for number, line in lines if line.strip()]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EvaluationError(f"{path}: no such file") from error
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: is not UTF-8 text ({one_line(error)}); save it as UTF-8") from error


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not valid JSON ({one_line(error)})") from error


def _problem_from_record(where: str, record: Any, default_id: str, default_kind: str) -> BenchmarkProblem:
    problem = _field(where, record, "problem")
    if not isinstance(problem, str) or not problem.strip():
        raise EvaluationError(f"{where}: field 'problem' must be a non-empty text, got {problem!r}")
    kind = record.get("kind", default_kind)
    if kind not in KINDS:
        raise EvaluationError(f"{where}: field 'kind' must be one of {', '.join(KINDS)}, got {kind!r}")
    level = record.get("level")
    return BenchmarkProblem(
        problem_id=_problem_id(where, record, default_id),
        problem=problem,
        answer=_letter(where, record) if kind == "letter" else _answer_text(where, record),
        kind=kind,
        level=None if level is None else str(level).removeprefix("Level "),  # as in MATH itself
        options_seed=record.get("options_seed"),
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
    raise EvaluationError(f"{where}: field 'answer' must be a number or a non-empty text, got {answer!r}")


def _letter(where: str, record: Any) -> str:
    answer = _answer_text(where, record)
    letter = choice_letter(answer)
    if letter is None:
        raise EvaluationError(
            f"{where}: field 'answer' must be the letter of a choice, since kind is 'letter', got {answer!r}; use a "
            "letter, or another kind"
        )
    return letter


def _common_kind(located: list[tuple[str, Any]]) -> str:
    if any(isinstance(record, Mapping) and "kind" in record for _, record in located):
        return "expression"
    answers = [_answer_text(where, record) for where, record in located]
    if all(re.fullmatch(r"[-+]?\d+(\.\d+)?", answer) for answer in answers):
        return "number"
    if all(re.fullmatch(r"[A-Z]", answer) for answer in answers):
        return "letter"
    return "expression"


def _is_multiple_choice(record: Any) -> bool:
    return isinstance(record, Mapping) and _QUESTION in record and _CORRECT in record


def _with_lettered_options(where: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with `problem`, `answer` (a letter), `kind` and `options_seed`; GPQA's `Record ID` becomes `id`.

    Raises:
      EvaluationError: names record and field.
    """
    question, *options = (_choice_text(where, record, name) for name in (_QUESTION, _CORRECT, *_INCORRECT))
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
    """An order of 0 .. count - 1, by hash, since random number generators change between versions."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())


def _choice_text(where: str, record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f"{where}: field {name!r} must be a non-empty text, got {value!r}")
    return value.strip()
