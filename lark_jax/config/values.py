"""Nested mappings, as an ml_collections file or the command line gives them, become frozen dataclasses."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import FieldReference

from lark_jax.errors import ConfigError

Section = TypeVar("Section")


def section_from_mapping(section: type[Section], values: Mapping[str, Any], prefix: str) -> Section:
    """An instance of the dataclass `section`; sections inside it are built in the same way.

    Args:
      prefix: of field names in messages, as "finetune.".

    Raises:
      ConfigError: a field is unknown (with the nearest known name), missing, of the wrong type, or out of range.
    """
    hints = typing.get_type_hints(section)
    _refuse_unknown_fields(values, list(hints), prefix)
    arguments = {name: converted(hints[name], values[name], f"{prefix}{name}") for name in values}
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in arguments:
            raise ConfigError(f"config.{prefix}{field.name}: missing; set it in the config file")
    return section(**arguments)


def _refuse_unknown_fields(values: Mapping[str, Any], known: list[str], prefix: str) -> None:
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else "known fields: " + ", ".join(known)
            raise ConfigError(f"config.{prefix}{name}: unknown field; {hint}")


def converted(hint: Any, value: Any, field: str) -> Any:
    """`value` as the type `hint`; lossless conversions only (int to float, list to tuple)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"config.{field}: expected a section with fields, got {value!r}")
        return section_from_mapping(typing.cast(type, hint), dict(value.items()), prefix=f"{field}.")
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"config.{field}: expected a tuple, got {value!r}")
        return tuple(converted(typing.get_args(hint)[0], item, field) for item in _items(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"config.{field}: expected {hint.__name__}, got {value!r}")
    return value


def _items(value: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Items with references to other fields resolved; `--config.stages=score,select` arrives as one string.

    So does a flag with nothing behind its `=`, an empty one: it stands for no item.
    """
    items: list[Any] = []
    for item in value:
        if isinstance(item, FieldReference):
            items.append(item.get())
        else:
            items.extend(filter(None, item.split(",")) if isinstance(item, str) else [item])
    return items
