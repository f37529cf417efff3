"""Spellings of an answer that math-verify stumbles over, brought into the one that it reads.

Only marks that carry no value go: layout, the signs of mathematics around the whole, a full stop at the end, spaces
between groups of three digits. What is said stays with math-verify to judge.
"""

import re

MAX_WRAPPINGS = 6  # such as `{$5.$}`; more is no spelling of anything

_LAYOUT = re.compile(r"\\(?:displaystyle|textstyle|quad|qquad)(?![A-Za-z])")
# Between groups of three digits: LaTeX's spaces or blanks, a braced comma, or a comma with \!, which draws it close.
# With any other space a comma lists two numbers: "1, 234", "(100,\,200)".
_SEPARATOR = r"(?:\s*(?:\\[,!;: ]|~)+\s*|\s*,?\s*(?:\\!)+\s*,?\s*|\{,\}|\s+)"
_GROUPED_NUMBER = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?!\d)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*\)?\s*[.:]?")
_IN_BASE = re.compile(r"(\w+)_\{?(\d+)\}?")
_STOP = re.compile(r"(?<![.\\])(?<!\\left)(?<!\\right)\.$")  # none of "...", `\.` and the empty delimiter `\right.`
_SPACES = ("\\,", "\\;", "\\:", "\\!", "\\ ")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def tidy(answer: str) -> str:
    """`answer` without marks that carry no value; a text that holds nothing else comes back empty."""
    text = _LAYOUT.sub(" ", answer)
    text = _GROUPED_NUMBER.sub(lambda number: re.sub(r"\D", "", number.group()), text)
    text = text.replace(r"\varnothing", r"\emptyset").replace("~", " ")
    for _ in range(MAX_WRAPPINGS):
        text = _without_stop(_without_delimiters(_trimmed(text)))
    wrapped = _TEXT.fullmatch(text)
    return wrapped.group(1).strip() if wrapped and _NUMBER.fullmatch(wrapped.group(1).strip()) else text


def words(answer: str) -> str | None:
    """The words that an answer wholly consists of, in small letters with single spaces; None for anything else.

    Words are what stands in `\\text{}` or a bare run of four letters and more: shorter ones may be products.
    """
    wrapped = _TEXT.fullmatch(answer.strip())
    text = " ".join((wrapped.group(1) if wrapped else answer).split()).strip(".")
    shortest = 1 if wrapped else 4
    is_text = all(part.isalpha() for part in text.split(" ")) and max(map(len, text.split(" "))) >= shortest
    return text.casefold() if is_text else None


def choice_letter(answer: str) -> str | None:
    """The choice that `B`, `(b)`, `B.` or `\\text{B}` names, as a capital; None for anything else."""
    match = _LETTER.fullmatch(_TEXT.sub(r"\1", answer.strip().strip("$")).strip())
    return match.group(1).upper() if match else None


def in_base(answer: str) -> tuple[str, str] | None:
    """Digits and base of `4210_5` or `4210_{5}`; None for anything else."""
    match = _IN_BASE.fullmatch(answer)
    return (match.group(1), match.group(2)) if match else None


def without_percent(answer: str) -> str:
    """`answer` without the sign of per cent at its end: problems that ask for per cent have golds of both kinds."""
    return re.sub(r"\s*\\?%$", "", answer)


def _trimmed(text: str) -> str:
    """Without spaces at either end, those of LaTeX included."""
    text = text.strip()
    while text[:2] in _SPACES:
        text = text[2:].lstrip()
    while text[-2:] in _SPACES and text[-3:-2] != "\\":
        text = text[:-2].rstrip()
    return text


def _without_delimiters(text: str) -> str:
    for left, right in _DELIMITERS:
        inner = text[len(left) : len(text) - len(right)]
        if len(text) >= len(left) + len(right) and text.startswith(left) and text.endswith(right):
            return inner if left not in inner and right not in inner and not inner.endswith("\\") else text
    return text[1:-1] if text.startswith("{") and _closes_last(text) else text


def _without_stop(text: str) -> str:
    return text[:-1] if _STOP.search(text) else text


def _closes_last(text: str) -> bool:
    """Whether the brace that opens `text` is closed by its last character."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth <= 0:
            return match.end() == len(text) and match.group() == "}"
    return False
