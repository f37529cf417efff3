"""All configuration fields, from their declarations, as docs/config.md and for `--help`.

python -m lark_jax.config.reference > docs/config.md    # or: make config-reference
"""

import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from lark_jax.config.experiment import Experiment
from lark_jax.config.fields import Section, about
from lark_jax.config.values import is_section, type_name, without_none

INTRODUCTION = """\
# Configuration fields

Every field of an experiment, with its default. A config file starts from `lark_jax.recipe.paper_recipe()`, which has
all of these fields (but for `synthetic`) and changes the few defaults in which the paper differs; each of them is set
there with its source. On the command line a field is `--config.FIELD=VALUE`, a tuple `--config.FIELD=a,b`. "Paper"
is where the LARK paper gives the value.

This page is generated: `make config-reference`.
"""


@dataclasses.dataclass(frozen=True)
class FieldEntry:
    name: str  # as on the command line: "finetune.batch_size"
    type: str
    default: str  # empty: required
    unit: str
    meaning: str  # with the allowed values
    paper: str


@dataclasses.dataclass(frozen=True)
class SectionEntry:
    name: str  # empty: the experiment itself
    doc: str
    fields: tuple[FieldEntry, ...]


def section_entries(section: type[Section] = Experiment) -> Iterator[SectionEntry]:
    """`section` and the sections in it, in the order of their declaration."""
    hints = typing.get_type_hints(section)
    declared = dataclasses.fields(section)
    fields = tuple(
        _entry(section.prefix, field, hints[field.name])
        for field in declared
        if not is_section(without_none(hints[field.name])[0])
    )
    yield SectionEntry(section.prefix.rstrip("."), inspect.cleandoc(section.__doc__ or ""), fields)
    for field in declared:
        hint, _ = without_none(hints[field.name])
        if is_section(hint):
            yield from section_entries(hint)


def as_markdown() -> str:
    """docs/config.md."""
    return "\n".join([INTRODUCTION, *map(_section_as_markdown, section_entries())])


def as_text(names: tuple[str, ...] = (), width: int = 110) -> str:
    """The fields of all sections, or of those with one of `names`, for a terminal."""
    lines: list[str] = []
    for section in section_entries():
        if not names or section.name.partition(".")[0] in names:
            for field in section.fields:
                assignment = f"{field.name}={field.default}" if field.default else f"{field.name} (required)"
                unit = f" [{field.unit}]" if field.unit else ""
                lines.append(f"  {assignment}")
                lines += textwrap.wrap(field.meaning + unit, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _entry(prefix: str, field: "dataclasses.Field[Any]", hint: Any) -> FieldEntry:
    declared = about(field)
    rules = [check.allowed for check in (declared.check, declared.items) if check is not None]
    allowed = f" Allowed: {', each '.join(rules)}." if rules else ""
    return FieldEntry(
        name=prefix + field.name,
        type=type_name(hint),
        default="" if field.default is dataclasses.MISSING else repr(field.default),
        unit=declared.unit,
        meaning=declared.doc + allowed,
        paper=declared.paper,
    )


def _section_as_markdown(section: SectionEntry) -> str:
    title = f"## `{section.name}`\n\n" if section.name else ""
    head = "| field | type | default | unit | meaning |\n|---|---|---|---|---|\n"
    return title + section.doc + "\n\n" + head + "".join(map(_row, section.fields))


def _row(field: FieldEntry) -> str:
    default = f"`{field.default}`" if field.default else "required"
    meaning = field.meaning + (f" Paper: {field.paper}." if field.paper else "")
    cells = (
        f"`{field.name}`",
        f"`{field.type}`",
        default,
        field.unit,
        meaning.replace("|", "\\|").replace("<", "&lt;"),
    )
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
