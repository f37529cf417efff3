"""A table as the content of a CSV or a LaTeX file."""

import csv
import io

from lark_jax.report.table import Table

_LATEX = str.maketrans(
    {
        **{mark: f"\\{mark}" for mark in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\ensuremath{<}",
        ">": r"\ensuremath{>}",
        "≥": r"\ensuremath{\ge}",
        "±": r"\ensuremath{\pm}",
        "–": "--",
    }
)


def csv_table(table: Table) -> str:
    """A header and one line per row, quoted where needed (RFC 4180, but with single line feeds)."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([table.header, *table.rows])
    return stream.getvalue()


def latex_table(table: Table, rule_before_last: bool = False) -> str:
    """A `tabular` of the package booktabs; special characters are escaped.

    `rule_before_last` sets a rule above the last row, for a row of totals.
    """
    columns = "".join("r" if numeric else "l" for numeric in table.numeric)
    rows = [_latex_row(row) for row in table.rows]
    if rule_before_last:
        rows.insert(-1, r"\midrule")
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(table.header), r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_row(cells: tuple[str, ...]) -> str:
    return " & ".join(" ".join(cell.split()).translate(_LATEX) for cell in cells) + r" \\"
