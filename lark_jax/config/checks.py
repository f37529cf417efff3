"""Checks of configuration fields, as every section of the configuration uses them."""

import re

from lark_jax.errors import ConfigError


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises ConfigError, with the field as it is written on the command line, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"config.{field}: expected {allowed}, got {value!r}")


def require_one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is among `allowed`."""
    require(value in allowed, field, value, "one of " + ", ".join(repr(choice) for choice in allowed))


def require_variable(field: str, value: str | None) -> None:
    """Raises ConfigError unless `value` may be the name of an environment variable; it is not repeated.

    The key itself is easily put there, and a message would carry it on.
    """
    if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ConfigError(
            f"config.{field}: expected the name of an environment variable (letters, digits and _), such as API_KEY; "
            "the key itself goes into that variable"
        )


def require_url(field: str, value: str | None) -> None:
    """Raises ConfigError unless `value` is a server's address; one with a key in it would end up in manifests."""
    valid = value is not None and value.startswith(("http://", "https://")) and "@" not in value
    require(valid, field, value, "http://HOST:PORT/v1 or the like, without a key in it")
