"""What a judge is asked: a TOML file with criteria and texts, and the messages for a trajectory."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark_jax.errors import JudgeError
from lark_jax.pool.records import Message, Trajectory

BUILT_IN = Path(__file__).with_name("rubric.toml")
PLACEHOLDERS = ("{problem}", "{reasoning}")
FIELDS = ("criteria", "system", "user")


@dataclass(frozen=True)
class Rubric:
    criteria: tuple[str, ...]
    system: str | None
    user: str  # contains each of PLACEHOLDERS


def read_rubric(path: str | Path | None) -> Rubric:
    """Reads a rubric file; None: the built-in rubric.

    Raises:
      JudgeError: the file cannot be read, or has unknown, missing or invalid fields.
    """
    path = BUILT_IN if path is None else Path(path)
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # tomllib's and Unicode errors are ValueErrors
        raise JudgeError(f"{path}: cannot be read as TOML ({error})") from error
    if unknown := set(fields) - set(FIELDS):
        raise JudgeError(f"{path}: unknown field {min(unknown)!r}; known fields: {', '.join(FIELDS)}")
    criteria, user = _criteria(path, fields.get("criteria")), _text(path, fields, "user")
    for placeholder in PLACEHOLDERS:
        if placeholder not in user:
            raise JudgeError(f"{path}: field 'user' lacks {placeholder}, which the text replaces")
    return Rubric(criteria, _text(path, fields, "system") if "system" in fields else None, user)


def messages_for(rubric: Rubric, trajectory: Trajectory, refusals: Sequence[str] = ()) -> tuple[Message, ...]:
    """The conversation that the judge continues.

    Args:
      refusals: why earlier answers were rejected, oldest first. The judge is told, so that even greedy decoding gives
        another answer.
    """
    texts = {"{problem}": problem_of(trajectory), "{reasoning}": trajectory.response}
    # One pass: a placeholder inside an inserted text is not replaced.
    user = re.sub("|".join(map(re.escape, PLACEHOLDERS)), lambda placeholder: texts[placeholder.group()], rubric.user)
    for number, refusal in enumerate(refusals, 1):  # the wording is part of the keys of kept answers
        user += f"\n\nAnswer {number} was of no use: {refusal}. Give one that is."
    system = () if rubric.system is None else (Message("system", rubric.system.strip()),)
    return (*system, Message("user", user.strip()))


def problem_of(trajectory: Trajectory) -> str:
    """The problem as text: the user's turn; for longer conversations all turns but the system's, with their roles."""
    turns = [message for message in trajectory.prompt if message.role != "system"]
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in turns)


def _criteria(path: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise JudgeError(f"{path}: field 'criteria' must be a list of names, got {value!r}")
    for name in value:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise JudgeError(f"{path}: criterion {name!r}: lower-case letters, digits and underscores only")
    if len(set(value)) != len(value):
        raise JudgeError(f"{path}: field 'criteria' has a name twice: {', '.join(value)}")
    return tuple(value)


def _text(path: Path, fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise JudgeError(f"{path}: field {name!r} must be a non-empty text, got {value!r}")
    return value
