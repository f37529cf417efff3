"""From the columns of a source to the fields of a pool record, before these are checked.

A conversation is a list of {role, content}, ShareGPT's list of {from, value}, or two texts, prompt and response, with
or without a system prompt.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lark_jax.config import ColumnsConfig
from lark_jax.pool.schema import RecordError, identity_of

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # other names are kept
_MESSAGES, _SHAREGPT = "messages", "conversations"

Normalise = Callable[[Any, str, Mapping[str, str]], Any]


def normaliser(columns: ColumnsConfig) -> Normalise:
    """A function (record, location, defaults) -> record under the field names of a pool record.

    `defaults` follow from a record's file, such as its teacher; the record's own values take precedence. Anything but
    an object passes through, so that the schema refuses it. The function raises RecordError.
    """
    mapping = columns.given()

    def normalise(record: Any, location: str, defaults: Mapping[str, str]) -> Any:
        if not isinstance(record, Mapping):
            return record
        for field, column in mapping.items():
            if column not in record:
                raise RecordError(missing_column(field, column, record), location)
        fields = _renamed(record, mapping)
        fields |= {name: value for name, value in defaults.items() if fields.get(name) is None}
        try:
            return _with_messages(fields, mapping)
        except ValueError as error:
            raise RecordError(str(error), location, *identity_of(fields)) from None

    return normalise


def missing_column(field: str, column: str, found: Iterable[str]) -> str:
    """The message for a configuration that names a column that the source does not have."""
    return f"config.pool.columns.{field}: there is no column {column!r}; found: {', '.join(found) or 'none'}"


def _renamed(record: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The record under our field names; a column with the name of a field that is read elsewhere goes into meta."""
    if not mapping:
        return dict(record)
    used = set(mapping.values())
    fields = {name: value for name, value in record.items() if name not in used and name not in mapping}
    hidden = {name: record[name] for name in mapping if name in record and name not in used}
    meta = record.get("meta")
    if hidden and (meta is None or isinstance(meta, Mapping)):
        fields["meta"] = {**(meta or {}), **hidden}
    return fields | {field: record[column] for field, column in mapping.items()}


def _with_messages(fields: dict[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """`fields` with `messages` built from what the source has; unchanged if it has no conversation."""
    if "prompt" in mapping or "response" in mapping:
        return _of_texts(fields)
    if fields.get(_MESSAGES) is not None:
        fields[_MESSAGES] = _of_turns(fields[_MESSAGES])
        return _with_system(fields) if "system" in mapping else fields
    if fields.get(_SHAREGPT) is not None:
        fields[_MESSAGES] = _of_turns(fields.pop(_SHAREGPT))
        return _with_system(fields)
    if fields.get("prompt") is not None and fields.get("response") is not None:
        return _of_texts(fields)
    return fields


def _of_texts(fields: dict[str, Any]) -> dict[str, Any]:
    for name in ("prompt", "response"):
        if not isinstance(fields.get(name), str):
            raise ValueError(f"field {name}: missing or not a text; a record needs both prompt and response")
    prompt, response = fields.pop("prompt"), fields.pop("response")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return _with_system({**fields, _MESSAGES: turns})


def _with_system(fields: dict[str, Any]) -> dict[str, Any]:
    system, turns = fields.pop("system", None), fields[_MESSAGES]
    if system is None or system == "":
        return fields
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and turns[0].get("role") == "system":
        raise ValueError("field system: the conversation has a system turn of its own; remove one of the two")
    return fields | {_MESSAGES: [{"role": "system", "content": system}, *turns]} if isinstance(turns, list) else fields


def _of_turns(turns: Any) -> Any:
    """ShareGPT's turns as {role, content}; anything else as it is."""
    return [_of_turn(turn) for turn in turns] if isinstance(turns, list) else turns


def _of_turn(turn: Any) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn or "role" in turn:
        return turn
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    role = turn["from"]
    return {
        "role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role,
        "content": turn.get("value"),
        **others,
    }
