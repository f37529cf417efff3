"""Tables as plain data, and as aligned text, markdown, CSV or LaTeX."""

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

MISSING = "–"
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


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]  # per column: right-aligned

    def __post_init__(self) -> None:
        widths = {len(row) for row in (self.header, self.numeric, *self.rows)}
        if len(widths) != 1:
            raise ValueError(f"rows of a table differ in length: {sorted(widths)}")


def student_label(method: str, budget: int | None) -> str:
    """A student's name in figures and tables; the budget is None before fine-tuning."""
    return method if budget is None else f"{method} B={budget}"


def budget_cell(budget: int | None) -> str:
    return MISSING if budget is None else str(budget)


def text_table(table: Table) -> str:
    """Aligned plain text with a rule below the header; every line has the same display width."""
    lines = [_one_line_cells(line) for line in (table.header, *table.rows)]
    widths = [max(_display_width(line[column]) for line in lines) for column in range(len(table.header))]
    padded = ["  ".join(map(_pad, line, widths, table.numeric)) for line in lines]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([padded[0], rule, *padded[1:]])


def markdown_table(table: Table) -> str:
    """GitHub-flavoured markdown; `|` and line breaks inside cells are escaped."""
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [_one_line_cells(line) for line in (table.header, *table.rows)]
    escaped = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [escaped[0], rule, *escaped[1:]])


def csv_table(table: Table) -> str:
    """A header and one line per row, quoted where needed (RFC 4180, but with single line feeds)."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([table.header, *table.rows])
    return stream.getvalue()


def latex_table(table: Table, rule_before_last: bool = False) -> str:
    """A `tabular` for the package booktabs, with special characters escaped.

    `rule_before_last` adds a rule above the last row, for totals.
    """
    columns = "".join("r" if numeric else "l" for numeric in table.numeric)
    rows = [_latex_row(row) for row in table.rows]
    if rule_before_last:
        rows.insert(-1, r"\midrule")
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(table.header), r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _one_line_cells(cells: Sequence[str]) -> list[str]:
    """Cells without line breaks and control characters, which a terminal would obey."""
    return ["".join(mark for mark in " ".join(cell.split()) if mark.isprintable()) for cell in cells]


def _display_width(text: str) -> int:
    """Terminal columns of `text`: two for wide characters, none for combining marks."""
    return sum(0 if unicodedata.combining(mark) else 1 + (unicodedata.east_asian_width(mark) in "WF") for mark in text)


def _pad(text: str, width: int, numeric: bool) -> str:
    space = " " * (width - _display_width(text))
    return space + text if numeric else text + space


def _latex_row(cells: tuple[str, ...]) -> str:
    return " & ".join(" ".join(cell.split()).translate(_LATEX) for cell in cells) + r" \\"
