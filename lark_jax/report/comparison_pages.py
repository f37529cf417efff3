"""A comparison of students as HTML: a table of all pairs, which links to a page for each."""

from pathlib import Path

from lark_jax.report.comparison import PROBLEMS_SHOWN, Comparison
from lark_jax.report.templates import render
from lark_jax.runtime.files import write_text

FOLDER = "comparisons"  # beside the report's page


def write_comparison_pages(comparison: Comparison | None, directory: Path) -> None:
    """Writes `comparisons/A_vs_B.html` for every pair that has a page, and removes the pages of other pairs."""
    pages = {} if comparison is None else {page.file_name: page for page in comparison.pages}
    for path in (directory / FOLDER).glob("*.html"):
        if path.name not in pages:
            path.unlink()
    for name, page in pages.items():
        write_text(directory / FOLDER / name, render("comparison.html.j2", page=page, shown=PROBLEMS_SHOWN))
