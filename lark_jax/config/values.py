"""Between nested mappings, as config files and the command line give them, and frozen dataclasses."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, FieldReference

from lark_jax.config.fields import Section, refuse_missing
from lark_jax.errors import ConfigError

AnySection = TypeVar("AnySection", bound=Section)


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type `hint` without its None, and whether it had one."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False
    (only,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    return only, True


def is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def as_config_dict(section: type[Section]) -> ConfigDict:
    """The defaults of `section` and of the sections in it, as a config file states them.

    A required field is empty, an optional one None with its type, an optional section absent.
    """
    config = ConfigDict()
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint, optional = without_none(hints[field.name])
        if is_section(hint):
            if not optional:
                config[field.name] = as_config_dict(hint)
        elif optional:
            config[field.name] = FieldReference(field.default, field_type=hint)
        else:
            config[field.name] = hint() if field.default is dataclasses.MISSING else field.default
    return config


def section_from_mapping(section: type[AnySection], values: Mapping[str, Any], prefix: str) -> AnySection:
    """An instance of `section`; sections inside it are built in the same way.

    Args:
      prefix: of field names in messages, as "finetune.".

    Raises:
      ConfigError: a field is unknown (with the nearest known name), missing, of the wrong type, or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    for name in values:
        _require_known(name, list(fields), prefix)
    arguments = {name: converted(hints[name], values[name], f"{prefix}{name}") for name in values}
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in arguments:
            refuse_missing(prefix + name)
    return section(**arguments)


def section_of(section: type[AnySection], values: Mapping[str, Any]) -> AnySection:
    """One section of an experiment's `values`, without looking at the others; raises as `section_from_mapping`."""
    name = section.prefix.rstrip(".")
    found: AnySection = converted(section, values.get(name, {}), name)
    return found


def type_of(section: type[Section], name: str) -> Any:
    """The type of the field `name` ("columns.prompt") of `section`; raises ConfigError, with the nearest known name."""
    first, _, rest = name.partition(".")
    hints = typing.get_type_hints(section)
    _require_known(first, [field.name for field in dataclasses.fields(section)], section.prefix)
    hint, _ = without_none(hints[first])
    if rest and not is_section(hint):
        raise ConfigError(
            f"config.{section.prefix}{first}: not a section, so there is no config.{section.prefix}{name}"
        )
    return type_of(hint, rest) if rest else hints[first]


def type_name(hint: Any) -> str:
    """`hint` in words, as "int or None"."""
    hint, optional = without_none(hint)
    if is_section(hint):
        return "a section with fields"
    return (hint.__name__ if not typing.get_args(hint) else str(hint)) + (" or None" if optional else "")


def _require_known(name: str, known: list[str], prefix: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {prefix}{close[0]}?" if close else "known fields: " + ", ".join(known)
        raise ConfigError(f"config.{prefix}{name}: unknown field; {hint}")


def converted(hint: Any, value: Any, field: str) -> Any:
    """`value` as the type `hint`; only lossless conversions (int to float, list to tuple)."""
    hint, optional = without_none(hint)
    if optional and (value is None or value == ""):  # on the command line, nothing after `=` takes a value away
        return None
    if is_section(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"config.{field}: expected a section with fields, got {value!r}")
        return section_from_mapping(hint, dict(value.items()), prefix=f"{field}.")
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"config.{field}: expected a tuple, got {value!r}")
        items, each = _items(value), typing.get_args(hint)[0]
        if each is not str and any(isinstance(item, str) for item in items):
            raise ConfigError(f"config.{field}: expected {each.__name__}s, got {', '.join(map(repr, items))}")
        return tuple(converted(each, item, field) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"config.{field}: expected {hint.__name__}, got {value!r}")
    return value


def split_commas(words: str | Iterable[str]) -> list[str]:
    """The words of `a,b,c`, or of several such; empty words, as after a last comma, are none."""
    return [word for item in ([words] if isinstance(words, str) else words) for word in item.split(",") if word]


def _items(value: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Items with references to other fields resolved; `--config.stages=score,select` arrives as one string."""
    items: list[Any] = []
    for item in value:
        if isinstance(item, FieldReference):
            items.append(item.get())
        else:
            items.extend(split_commas(item) if isinstance(item, str) else [item])
    return items
