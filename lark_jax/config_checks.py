"""Checks of configuration fields, as every section of the configuration uses them."""

from lark_jax.errors import ConfigError


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises ConfigError, with the field as it is written on the command line, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"config.{field}: expected {allowed}, got {value!r}")


def require_one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is among `allowed`."""
    require(value in allowed, field, value, "one of " + ", ".join(repr(choice) for choice in allowed))


def require_url(field: str, value: str | None) -> None:
    """Raises ConfigError unless `value` is a server's address; one with a key in it would end up in manifests."""
    valid = value is not None and value.startswith(("http://", "https://")) and "@" not in value
    require(valid, field, value, "http://HOST:PORT/v1 or the like, without a key in it")
