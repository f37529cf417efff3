"""How a configuration field is declared: default, meaning, unit, source in the paper and allowed values together."""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from lark_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Check:
    """A rule for one value; `allowed` completes "expected ..." in its message."""

    allowed: str
    holds: Callable[[Any], bool]
    shows_value: bool = True  # False: the value may be a secret and is not repeated


def at_least(minimum: int) -> Check:
    return Check(f"an integer >= {minimum}", lambda value: value >= minimum)


def one_of(*choices: str) -> Check:
    return Check("one of " + ", ".join(map(repr, choices)), lambda value: value in choices)


def _distinct(values: tuple[Any, ...]) -> bool:
    return len(set(values)) == len(values)


POSITIVE = Check("a positive number", lambda value: 0 < value < math.inf)
NON_NEGATIVE = Check("a number >= 0", lambda value: 0 <= value < math.inf)
FRACTION = Check("a number in [0, 1)", lambda value: 0 <= value < 1)
DISTINCT = Check("distinct values", _distinct)
SOME_DISTINCT = Check("one or more distinct values", lambda values: len(values) > 0 and _distinct(values))
URL = Check(
    "http://HOST:PORT/v1 or similar, without a key in it",  # a key would end up in manifests
    lambda value: value.startswith(("http://", "https://")) and "@" not in value,
    shows_value=False,
)
# People put the key itself here by mistake, and a message would pass it on.
VARIABLE = Check(
    "the name of an environment variable (letters, digits and _), such as API_KEY; the key itself goes into that "
    "variable",
    lambda value: re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is not None,
    shows_value=False,
)


@dataclasses.dataclass(frozen=True)
class About:
    """What is known about a field besides its name, type and default."""

    doc: str
    unit: str = ""
    paper: str = ""  # where the paper gives the value, or what it has instead
    check: Check | None = None  # of the value; None passes, where the type allows it
    items: Check | None = None  # of every item of a tuple
    path: bool = False  # a leading `~` is the home folder


def field(default: Any, doc: str, **more: Any) -> Any:
    """A dataclass field with a default; `more` as in `About`."""
    return dataclasses.field(default=default, metadata={"about": About(doc, **more)})


def required(doc: str, **more: Any) -> Any:
    """A dataclass field that the config file has to set; an empty text counts as not set."""
    return dataclasses.field(metadata={"about": About(doc, **more)})


def about(declared: "dataclasses.Field[Any]") -> About:
    """What a field was declared with; a section describes itself in its docstring."""
    return declared.metadata.get("about", About(""))


def refuse_missing(field_name: str) -> NoReturn:
    raise ConfigError(f"config.{field_name}: missing; set it in the config file, or with --config.{field_name}=VALUE")


def expand_home(path: str) -> str:
    """`path` with a leading `~` replaced by the home folder; that of NAME=PATH too."""
    name, equals, location = path.partition("=")
    if equals and location.startswith("~"):
        return f"{name}={os.path.expanduser(location)}"
    return os.path.expanduser(path)


@dataclasses.dataclass(frozen=True)
class Section:
    """Part of the configuration; once constructed, its paths are expanded and every field has passed its checks."""

    prefix: ClassVar[str] = ""  # of field names in messages, as on the command line: "finetune."

    def __init_subclass__(cls, name: str = "") -> None:
        cls.prefix = f"{name}." if name else ""

    def __post_init__(self) -> None:
        for declared in dataclasses.fields(self):
            value = getattr(self, declared.name)
            if declared.default is dataclasses.MISSING and value == "":
                refuse_missing(self.prefix + declared.name)
            if about(declared).path:
                if "" in (value, *(value if isinstance(value, tuple) else ())):
                    raise ConfigError(f"config.{self.prefix}{declared.name}: expected a path, got an empty one")
                object.__setattr__(self, declared.name, _expanded(value))
            if value is not None:
                _check_value(self.prefix + declared.name, value, about(declared))
        self.check()

    def check(self) -> None:
        """Rules that involve more than one field."""

    def require(self, condition: bool, name: str, allowed: str) -> None:
        """Raises ConfigError with the field as it is written on the command line, unless `condition` holds."""
        if not condition:
            raise ConfigError(f"config.{self.prefix}{name}: expected {allowed}, got {getattr(self, name)!r}")

    def require_url(self, name: str) -> None:
        """For an address that only some settings need."""
        _check_value(self.prefix + name, getattr(self, name) or "", About("", check=URL))


def _check_value(name: str, value: Any, rules: About) -> None:
    each = ""
    if rules.items is not None:
        each = f", each {rules.items.allowed}"
        for item in value:
            if not rules.items.holds(item):
                raise ConfigError(f"config.{name}: expected {rules.items.allowed}, got {item!r}")
    if rules.check is not None and not rules.check.holds(value):
        found = f", got {value!r}" if rules.check.shows_value else ""
        raise ConfigError(f"config.{name}: expected {rules.check.allowed}{each}{found}")


def _expanded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(expand_home, value))
    return None if value is None else expand_home(value)
