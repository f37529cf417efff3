"""The report as HTML: one self-contained page that loads nothing, runs no scripts and shows all text as text.

Pairs of students have pages of their own, which it links to. Templates are the `.j2` files of this folder.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from matplotlib.figure import Figure

from lark_jax.report.comparison import PROBLEMS_SHOWN, Comparison
from lark_jax.report.contamination import contamination_section
from lark_jax.report.content import Landscape, ReportContent, StageSummary
from lark_jax.report.figures import accuracy_figure, landscape_figure, loss_figure
from lark_jax.report.selection_figure import selection_figure
from lark_jax.report.style import clean, method_styles, png_bytes, svg_text
from lark_jax.report.table import MISSING, Table, accuracy_detail_table, accuracy_table, loss_table, selection_table
from lark_jax.report.table_one import difference_table
from lark_jax.runtime.files import atomic_path, write_text

COMPARISONS = "comparisons"  # folder next to the report's page
RECORDS_SHOWN = 1_000  # skipped records per stage; the manifest has all
REASONS_SHOWN = 20
FIGURE_NAMES = ("accuracy", "loss", "selections", "landscape")

SELECTION_CAPTION = (
    "The trajectories in each selection. Left: the Jaccard index |A and B| / |A or B| of every two selections; at "
    "different budgets it cannot reach 1. Right: each teacher's share of the training weight."
)


@dataclass(frozen=True)
class _SkippedSection:
    reasons: Table
    records: Table
    caption: str  # of the records


@dataclass(frozen=True)
class Plate:
    """A figure with its title and caption."""

    figure: Figure
    title: str
    caption: str


def write_report(content: ReportContent, directory: str | Path) -> Path:
    """Writes `index.html`, pages for pairs of students in `comparisons/`, and a PNG file of each figure that has data:
    `accuracy.png`, `loss.png`, `selections.png`, `landscape.png`.

    Each file is replaced atomically, the page last; equal content gives equal bytes. Returns the page's path.
    """
    directory = Path(directory)
    plates = plates_of(content)
    for name in FIGURE_NAMES:
        if name in plates:
            with atomic_path(directory / f"{name}.png") as temporary:
                temporary.write_bytes(png_bytes(plates[name].figure))
        else:
            (directory / f"{name}.png").unlink(missing_ok=True)
    write_comparison_pages(content.comparison, directory)
    page = directory / "index.html"
    write_text(page, render_page(content, plates))
    return page


def write_comparison_pages(comparison: Comparison | None, directory: Path) -> None:
    """Writes `comparisons/A_vs_B.html` for every pair that has a page and removes the pages of other pairs."""
    pages = {} if comparison is None else {page.file_name: page for page in comparison.pages}
    for path in (directory / COMPARISONS).glob("*.html"):
        if path.name not in pages:
            path.unlink()
    for name, page in pages.items():
        write_text(
            directory / COMPARISONS / name, render_template("comparison.html.j2", page=page, shown=PROBLEMS_SHOWN)
        )


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
    svgs = {name: svg_text(plate.figure, name, plate.title, plate.caption) for name, plate in plates.items()}
    return render_template(
        "page.html.j2",
        content=content,
        comparisons=COMPARISONS,
        contamination=contamination_section(content.contamination) if content.contamination else None,
        num_benchmarks=len({result.benchmark for result in content.results}),
        accuracy=accuracy_table(content.results),
        accuracy_detail=accuracy_detail_table(content.results),
        accuracy_caption=_accuracy_caption(content),
        differences=difference_table(content.differences) if content.differences else None,
        differences_caption=_differences_caption(content),
        loss=loss_table(content.curves),
        selections=selection_table(content.selections) if content.selections else None,
        landscape=_landscape_table(content.landscape) if content.landscape else None,
        skipped=[_skipped_section(stage) for stage in content.stages],
        figures=svgs,
        figure_captions={name: plate.caption for name, plate in plates.items()},
    )


def plates_of(content: ReportContent) -> dict[str, Plate]:
    """The figures that have data, by name. A method has the same colour in all figures."""
    tuned = [result.method for result in content.results if result.budget is not None]
    styles = method_styles([*tuned, *(curve.method for curve in content.curves)])
    plates = {}
    if content.results:
        figure = accuracy_figure(content.results, styles)
        plates["accuracy"] = Plate(figure, "Accuracy by method and budget", _accuracy_figure_caption(content))
    if content.curves:
        figure = loss_figure(content.curves, styles)
        plates["loss"] = Plate(figure, "Loss by trajectories and by tokens", _loss_caption(content))
    if content.selections:
        figure = selection_figure(content.selections)
        plates["selections"] = Plate(figure, "Overlap and teachers of the selections", SELECTION_CAPTION)
    if content.landscape and content.landscape.candidates:
        caption = _landscape_caption(content.landscape)
        plates["landscape"] = Plate(landscape_figure(content.landscape), "Scores of one problem's candidates", caption)
    return plates


def _loss_caption(content: ReportContent) -> str:
    caption = (
        "Training loss of each run, weighted as in Eq. 1, by trajectories and target tokens seen. Pale: every "
        "optimizer step; strong: trailing mean over 1/20 of the run. Runs train on different trajectories, so these "
        "curves do not rank the methods."
    )
    if any(curve.held_out for curve in content.curves):
        caption += (
            " Below: the unweighted loss on one random trajectory of each held-out problem, the same for all runs. "
            "It measures how well a student predicts the pool's average answer, which is what random selection trains "
            "for; compare methods by accuracy instead."
        )
    return caption


def _accuracy_caption(content: ReportContent) -> str:
    caption = "Accuracy in percent: mean ± sample standard deviation over decoding seeds."
    return f"{caption} Interval: {content.interval_note}." if content.interval_note else caption


def _differences_caption(content: ReportContent) -> str:
    caption = (
        "Acc@k of one student minus that of another on the same problems, in percentage points, and the number of "
        "problems on which it is better or worse over all seeds."
    )
    if not content.interval_note:
        return caption
    return f"{caption} Interval: {content.interval_note}, drawn for both students together."


def _accuracy_figure_caption(content: ReportContent) -> str:
    caption = (
        "Mean accuracy over decoding seeds by selection method and budget B (trajectories per problem). Dashed line: "
        "the student before fine-tuning. Thick bars with caps: ± one standard deviation over seeds."
    )
    if any(result.interval for result in content.results):
        caption += f" Thin lines: {content.interval_note or 'confidence interval'}."
    return caption


def _landscape_caption(landscape: Landscape) -> str:
    return (
        f"Learnability score ĝ of all {len(landscape.candidates)} candidates of problem {landscape.problem_id}, "
        f"grouped by teacher; .1, .2, ... number a teacher's rollouts. Red border: selected by {landscape.method} at "
        f"B={landscape.budget}, labelled with the weight in the loss."
    )


def _landscape_table(landscape: Landscape) -> Table:
    header = ("teacher", "candidate", "score ĝ", "weight")
    rows = tuple(
        (
            teacher,
            candidate.candidate_id,
            f"{candidate.score:.5f}" if math.isfinite(candidate.score) else "not scored",
            f"{candidate.weight:.4f}" if candidate.selected else MISSING,
        )
        for teacher, group in landscape.by_teacher().items()
        for candidate in group
    )
    return Table(header, rows, (False, False, True, True))


def _skipped_section(stage: StageSummary) -> _SkippedSection:
    """The first records in the manifest's order, and the reasons of all records, most frequent first."""
    shown = stage.skipped[:RECORDS_SHOWN]
    rows = tuple((record.problem_id, record.candidate_id, record.location, record.reason) for record in shown)
    return _SkippedSection(
        reasons=_reason_counts(stage),
        records=Table(("problem", "candidate", "where", "reason"), rows, (False,) * 4),
        caption=_skipped_caption(stage),
    )


def _reason_counts(stage: StageSummary) -> Table:
    """Counts by the part of the reason before its colon."""
    counts = Counter(record.reason.partition(":")[0] for record in stage.skipped).most_common()
    rows = [(reason, f"{count:,}") for reason, count in counts[:REASONS_SHOWN]]
    others = counts[REASONS_SHOWN:]
    if others:
        rows.append((f"{len(others):,} other reasons", f"{sum(count for _, count in others):,}"))
    return Table(("reason", "records"), tuple(rows), (False, True))


def _skipped_caption(stage: StageSummary) -> str:
    if len(stage.skipped) <= RECORDS_SHOWN:
        return f"Every record that {stage.stage} skipped."
    return (
        f"The first {RECORDS_SHOWN:,} of {len(stage.skipped):,} records that {stage.stage} skipped; {stage.manifest} "
        "lists all."
    )
