"""Spellings of an answer: those that math-verify misreads, and the plain rules of the paper (Appendix C.4).

For math-verify, `tidy` removes only marks without a value: layout, math delimiters around the answer, a full stop at
its end, spaces between groups of three digits. Everything else is left to math-verify.

By the paper's rules (`evaluate.grader="paper"`) numbers compare by value, letters by case-folded equality, and
expressions as strings after a clean-up like that of Hendrycks et al. (2021) for MATH, which unifies spelling variants
of fractions, roots, units and spacing.
"""

import re
from fractions import Fraction

MAX_WRAPPINGS = 6  # such as `{$5.$}`; deeper nesting is not a spelling of an answer

_LAYOUT = re.compile(r"\\(?:displaystyle|textstyle|quad|qquad)(?![A-Za-z])")
# Between groups of three digits: LaTeX's spaces or blanks, a braced comma, or a comma with \!, a negative space.
# A comma with any other space separates two numbers: "1, 234", "(100,\,200)".
_SEPARATOR = r"(?:\s*(?:\\[,!;: ]|~)+\s*|\s*,?\s*(?:\\!)+\s*,?\s*|\{,\}|\s+)"
_GROUPED_NUMBER = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?!\d)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*\)?\s*[.:]?")
_IN_BASE = re.compile(r"(\w+)_\{?(\d+)\}?")
_STOP = re.compile(r"(?<![.\\])(?<!\\left)(?<!\\right)\.$")  # not "...", `\.` or the empty delimiter `\right.`
_SPACES = ("\\,", "\\;", "\\:", "\\!", "\\ ")
_DROPPED = ("\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\ ", "^{\\circ}", "^\\circ", "\\%", "%", "\\$", "$")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def tidy(answer: str) -> str:
    """`answer` without marks that have no value; empty if nothing else is left."""
    text = _LAYOUT.sub(" ", answer)
    text = _GROUPED_NUMBER.sub(lambda number: re.sub(r"\D", "", number.group()), text)
    text = text.replace(r"\varnothing", r"\emptyset").replace("~", " ")
    for _ in range(MAX_WRAPPINGS):
        text = _without_stop(_without_delimiters(_trimmed(text)))
    wrapped = _TEXT.fullmatch(text)
    return wrapped.group(1).strip() if wrapped and _NUMBER.fullmatch(wrapped.group(1).strip()) else text


def words(answer: str) -> str | None:
    """An answer that consists of words only, in lower case with single spaces; None for anything else.

    Words are the content of `\\text{}` or bare runs of four or more letters: shorter ones may be products.
    """
    wrapped = _TEXT.fullmatch(answer.strip())
    text = " ".join((wrapped.group(1) if wrapped else answer).split()).strip(".")
    shortest = 1 if wrapped else 4
    is_text = all(part.isalpha() for part in text.split(" ")) and max(map(len, text.split(" "))) >= shortest
    return text.casefold() if is_text else None


def choice_letter(answer: str) -> str | None:
    """The choice named by `B`, `(b)`, `B.` or `\\text{B}`, as a capital letter; None for anything else."""
    match = _LETTER.fullmatch(_TEXT.sub(r"\1", answer.strip().strip("$")).strip())
    return match.group(1).upper() if match else None


def in_base(answer: str) -> tuple[str, str] | None:
    """Digits and base of `4210_5` or `4210_{5}`; None for anything else."""
    match = _IN_BASE.fullmatch(answer)
    return (match.group(1), match.group(2)) if match else None


def without_percent(answer: str) -> str:
    """`answer` without a percent sign at its end: problems that ask for a percentage have golds of both kinds."""
    return re.sub(r"\s*\\?%$", "", answer)


def equal_by_paper_rules(gold: str, answer: str, kind: str) -> bool:
    """Whether `answer` is `gold` under the rules for `kind` ("number", "letter" or "expression")."""
    if kind == "letter":
        return answer.strip().upper() == gold.strip().upper()
    if kind == "number":
        gold_value, value = number_value(gold), number_value(answer)
        return gold.strip() == answer.strip() if gold_value is None or value is None else gold_value == value
    return normalize_expression(gold) == normalize_expression(answer)


def number_value(text: str) -> Fraction | None:
    """The exact value of a decimal or of a fraction a/b of two decimals; None for anything else."""
    numerator, slash, denominator = (part.strip() for part in text.strip().partition("/"))
    if not _NUMBER.fullmatch(numerator) or (slash and not _NUMBER.fullmatch(denominator)):
        return None
    if not slash:
        return Fraction(numerator)
    return None if Fraction(denominator) == 0 else Fraction(numerator) / Fraction(denominator)


def normalize_expression(text: str) -> str:
    """One spelling for the variants of a LaTeX answer; idempotent on known variants, harmless on other text."""
    text = text.replace("\n", "")
    text = re.sub(r"\\text\{\s.*?\}\s*$", "", text)  # a unit: "5 \text{ cm}"
    text = re.sub(r"\\(text|mathrm|textbf|mbox)\{([^{}]*)\}", r"\2", text)
    for dropped in _DROPPED:
        text = text.replace(dropped, "")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:  # "k=5"
        text = value
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\w)\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}", text)
    text = re.sub(r"\^(\w)", r"^{\1}", text)
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    return "\\frac{1}{2}" if text == "0.5" else text


def _trimmed(text: str) -> str:
    """Without spaces at either end, including those of LaTeX."""
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
    """Whether the brace that opens `text` is closed by the last character."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth <= 0:
            return match.end() == len(text) and match.group() == "}"
    return False
