"""The plain answer rules of the paper (Appendix C.4), kept available as `evaluate.grader="paper"`.

Numbers compare by value, letters by case-folded equality, expressions as strings after the kind of clean-up that
Hendrycks et al. (2021) describe for MATH: spelling variants of fractions, roots, units and spacing become one.
"""

import re
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)")
_DROPPED = ("\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\ ", "^{\\circ}", "^\\circ", "\\%", "%", "\\$", "$")


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
    """One spelling for the variants of the same LaTeX answer; idempotent on what it knows, harmless on the rest."""
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
