"""Jinja templates of this folder -> HTML that shows every text as text."""

from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined

from lark_jax.report.style import clean


def render(template: str, **values: object) -> str:
    """The template with `values`, and with the stylesheet as `css`; whatever is no template's own markup is escaped."""
    environment = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    return environment.get_template(template).render(css=_read("page.css"), **values).lstrip()


def _read(name: str) -> str:
    return (resources.files("lark_jax.report") / name).read_text(encoding="utf-8")


def _printable(value: object) -> object:
    """Control characters, which HTML forbids, become U+FFFD; line breaks and tabs stay."""
    if not isinstance(value, str) or hasattr(value, "__html__"):  # what the template marked as HTML itself
        return value
    return "".join(mark if mark in "\n\t" else clean(mark) for mark in value.replace("\r\n", "\n"))
