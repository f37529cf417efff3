"""The schema of a pool record: one mapping in, one valid Trajectory out, or an error that names the field."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lark_jax.errors import PoolError
from lark_jax.pool.records import ROLES, Message, SkippedRecord, Trajectory

REQUIRED_FIELDS = ("problem_id", "candidate_id", "teacher", "messages")
OPTIONAL_FIELDS = ("answer", "correct", "meta")

_MESSAGE_FIELDS = ("role", "content")


class RecordError(PoolError):
    """One record that breaks the schema; `problem_id` and `candidate_id` are empty if unknown."""

    def __init__(self, reason: str, location: str = "", problem_id: str = "", candidate_id: str = "") -> None:
        self.reason = reason
        self.location = location
        self.problem_id = problem_id
        self.candidate_id = candidate_id
        known_ids = [part for part in (problem_id, candidate_id) if part]
        super().__init__(": ".join([location, *([f"record {'/'.join(known_ids)}"] if known_ids else []), reason]))

    def as_skipped(self) -> SkippedRecord:
        return SkippedRecord(self.problem_id, self.candidate_id, self.location, self.reason)


def parse_record(record: Any, location: str) -> Trajectory:
    """Checks every field of one record. Message text is kept as it is; unknown fields go into `meta`.

    Raises:
      RecordError: with `location`, the record's ids as far as they are valid, the field and what to do.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"expected an object with fields, got {_kind(record)}", location)
    problem_id = candidate_id = ""
    try:
        problem_id = _identifier(record, "problem_id")
        candidate_id = _identifier(record, "candidate_id")
        return Trajectory(
            problem_id=problem_id,
            candidate_id=candidate_id,
            teacher=_teacher(record),
            messages=_messages(_required(record, "messages")),
            location=location,
            answer=None if record.get("answer") is None else _text("answer", record["answer"]),
            correct=_correct(record.get("correct")),
            meta=_meta(record),
        )
    except _FieldError as error:
        raise RecordError(str(error), location, problem_id, candidate_id) from None


def identity_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """problem_id and candidate_id of a record as far as they are valid, else empty."""

    def known(field: str) -> str:
        try:
            return _identifier(record, field)
        except _FieldError:
            return ""

    return known("problem_id"), known("candidate_id")


class _FieldError(Exception):
    """A field and what is wrong with it, before the record's name is known."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field}: {problem}")


def _required(record: Mapping[str, Any], field: str) -> Any:
    if record.get(field) is None:
        raise _FieldError(field, f"missing; every record needs {', '.join(REQUIRED_FIELDS)}")
    return record[field]


def _identifier(record: Mapping[str, Any], field: str) -> str:
    value = _required(record, field)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _FieldError(field, f"expected text or an integer, got {_kind(value)}")
    text = str(value)
    if not text.strip() or not text.isprintable():
        raise _FieldError(field, f"{text!r} is empty or has unprintable characters; give it a plain name")
    return text


def _teacher(record: Mapping[str, Any]) -> str:
    value = _text("teacher", _required(record, "teacher"))
    if not value.strip() or not value.isprintable():
        raise _FieldError("teacher", f"{value!r} is empty or has unprintable characters; name the teacher model")
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _FieldError("messages", f"expected a list of {{role, content}}, got {_kind(value)}")
    messages = tuple(_message(f"messages[{index}]", item) for index, item in enumerate(value))
    if not messages:
        raise _FieldError("messages", "the list is empty; it needs a prompt and one assistant turn")
    if messages[-1].role != "assistant":
        raise _FieldError("messages", f"the last turn is {messages[-1].role!r}; it must be the assistant's answer")
    if len(messages) == 1:
        raise _FieldError("messages", "there is no prompt before the assistant turn; add the problem as a user turn")
    if messages[-2].role == "assistant":
        raise _FieldError("messages", "two assistant turns at the end; join them into one")
    return messages


def _message(field: str, value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise _FieldError(field, f"expected an object with role and content, got {_kind(value)}")
    for name, item in value.items():
        # A null loses nothing: tables have one wherever another row has the field.
        if name not in _MESSAGE_FIELDS and item is not None:
            raise _FieldError(
                f"{field}.{name}", "unknown; only role and content are rendered, move its text to content"
            )
    role = _text(f"{field}.role", value.get("role"))
    if role not in ROLES:
        raise _FieldError(f"{field}.role", f"unknown role {role!r}; use one of {', '.join(ROLES)}")
    content = _text(f"{field}.content", value.get("content"))
    if not content.strip():
        raise _FieldError(f"{field}.content", "empty; give it text or remove the turn")
    return Message(role, content)


def _correct(value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise _FieldError("correct", f"expected true, false or nothing, got {_kind(value)}")
    return value


def _meta(record: Mapping[str, Any]) -> Mapping[str, Any]:
    given = record.get("meta")
    if given is not None and not isinstance(given, Mapping):
        raise _FieldError("meta", f"expected an object, got {_kind(given)}")
    meta = {name: _json_value(f"meta.{name}", value) for name, value in (given or {}).items()}
    for name, value in record.items():
        if name in REQUIRED_FIELDS or name in OPTIONAL_FIELDS:
            continue
        if name in meta:
            raise _FieldError(name, "is a column and a key of meta too; rename one of them")
        meta[name] = _json_value(name, value)
    return MappingProxyType(meta)


def _json_value(field: str, value: Any) -> Any:
    """`value`, if it can be written as JSON again."""
    if isinstance(value, str):
        return _text(field, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _FieldError(field, f"{value} is not a number that JSON can hold; use null")
    if isinstance(value, list):
        for index, item in enumerate(value):
            _json_value(f"{field}[{index}]", item)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _json_value(f"{field}.{name}", item)
    elif value is not None and not isinstance(value, bool | int | float):
        raise _FieldError(field, f"cannot be kept as JSON ({_kind(value)}); store it as text or drop the column")
    return value


def _text(field: str, value: Any) -> str:
    if value is None:
        raise _FieldError(field, "missing; expected text")
    if not isinstance(value, str):
        raise _FieldError(field, f"expected text, got {_kind(value)}")
    if "\0" in value:
        raise _FieldError(field, f"has a NUL character at position {value.index(chr(0))}; remove it")
    try:
        value.encode()  # several times faster than a search
    except UnicodeEncodeError as error:
        raise _FieldError(
            field, f"has half of a surrogate pair at position {error.start}, which is not text; remove it"
        ) from None
    return value


def _kind(value: Any) -> str:
    """The name of a wrong value's type in error messages, in JSON's terms if there are any."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"{'boolean' if isinstance(value, bool) else 'number'} {value}".lower()
    if isinstance(value, str):
        return f"text {value[:30]!r}"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
