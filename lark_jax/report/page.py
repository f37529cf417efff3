"""The report as HTML: one self-contained page that loads nothing, runs no scripts and shows all text as text.

Pairs of students have pages of their own, which it links to. Templates are the `.j2` files of this folder.
"""

from collections import Counter
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from lark_jax.report.accuracy import INTERVAL, accuracy_detail_table, accuracy_plate, accuracy_table, benchmark_names
from lark_jax.report.comparison import PROBLEMS_SHOWN
from lark_jax.report.contamination import contamination_section
from lark_jax.report.content import ReportContent, StageSummary
from lark_jax.report.losses import loss_plate, loss_table
from lark_jax.report.style import Plate, clean, method_styles, png_bytes, svg_text
from lark_jax.report.table import Table
from lark_jax.report.table_one import difference_table
from lark_jax.runtime.files import atomic_path, write_json, write_text

COMPARISONS = "comparisons"  # folder next to the report's page
RECORDS_SHOWN = 1_000  # skipped records per stage; the manifest has all
REASONS_SHOWN = 20


def write_report(content: ReportContent, directory: str | Path) -> Path:
    """Writes `index.html`, pages for pairs of students in `comparisons/`, a PNG file of each figure that has data, and
    a JSON file of each diagnostic's values.

    Each file is replaced atomically, the page last; equal content gives equal bytes. Returns the page's path.
    """
    directory = Path(directory)
    plates = plates_of(content)
    for name, plate in plates.items():
        with atomic_path(directory / f"{name}.png") as temporary:
            temporary.write_bytes(png_bytes(plate.figure))
    for name, section in content.sections.items():
        write_json(directory / f"{name}.json", section.values)
    for pair in content.comparison.pages if content.comparison else ():
        text = render_template("comparison.html.j2", page=pair, shown=PROBLEMS_SHOWN)
        write_text(directory / COMPARISONS / pair.file_name, text)
    page = directory / "index.html"
    write_text(page, render_page(content, plates))
    return page


def render_template(template: str, **values: object) -> str:
    """Fills in a template; `css` is the stylesheet, and everything but the template's own markup is escaped."""
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
    """Replaces control characters, which HTML forbids, with U+FFFD; keeps line breaks and tabs."""
    if not isinstance(value, str) or hasattr(value, "__html__"):  # marked as HTML by the template
        return value
    return "".join(mark if mark in "\n\t" else clean(mark) for mark in value.replace("\r\n", "\n"))


def render_page(content: ReportContent, plates: Mapping[str, Plate]) -> str:
    """The page's HTML, with the figures from `plates_of(content)`."""
    return render_template(
        "page.html.j2",
        content=content,
        plates=plates,
        svgs={name: svg_text(plate.figure, name, plate.title, plate.caption) for name, plate in plates.items()},
        comparisons=COMPARISONS,
        contamination=contamination_section(content.contamination) if content.contamination else None,
        num_benchmarks=len(benchmark_names(content.students)),
        accuracy=accuracy_table(content.students),
        accuracy_detail=accuracy_detail_table(content.students),
        interval=INTERVAL,
        differences=difference_table(content.differences) if content.differences else None,
        loss=loss_table(content.curves),
        reasons=[_reason_counts(stage) for stage in content.stages],
        skipped=[_skipped_table(stage) for stage in content.stages],
        records_shown=RECORDS_SHOWN,
    )


def plates_of(content: ReportContent) -> dict[str, Plate]:
    """The figures that have data, by name. A method has the same colour in all figures."""
    tuned = [student.method for student in content.students if student.budget is not None]
    styles = method_styles([*tuned, *(curve.method for curve in content.curves)])
    plates = {}
    if content.students:
        plates["accuracy"] = accuracy_plate(content.students, styles)
    if content.curves:
        plates["loss"] = loss_plate(content.curves, styles)
    return {**plates, **{name: section.plate for name, section in content.sections.items()}}


def _skipped_table(stage: StageSummary) -> Table:
    """The first records, in the manifest's order."""
    shown = stage.skipped[:RECORDS_SHOWN]
    rows = tuple((record.problem_id, record.candidate_id, record.location, record.reason) for record in shown)
    return Table(("problem", "candidate", "where", "reason"), rows, (False,) * 4)


def _reason_counts(stage: StageSummary) -> Table:
    """Counts by the part of the reason before its colon, most frequent first."""
    counts = Counter(record.reason.partition(":")[0] for record in stage.skipped).most_common()
    rows = [(reason, f"{count:,}") for reason, count in counts[:REASONS_SHOWN]]
    others = counts[REASONS_SHOWN:]
    if others:
        rows.append((f"{len(others):,} other reasons", f"{sum(count for _, count in others):,}"))
    return Table(("reason", "records"), tuple(rows), (False, True))
