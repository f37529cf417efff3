"""One self-contained HTML page: opens from disk, loads nothing, runs no script, and shows pool text as text."""

import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from lark_jax.report.comparison_pages import FOLDER, write_comparison_pages
from lark_jax.report.contamination import contamination_section
from lark_jax.report.content import Landscape, ReportContent
from lark_jax.report.figures import accuracy_figure, landscape_figure, loss_figure
from lark_jax.report.selection_figure import selection_figure
from lark_jax.report.skipped import skipped_section
from lark_jax.report.style import method_styles, png_bytes, svg_text
from lark_jax.report.table import MISSING, Table, accuracy_detail_table, accuracy_table, loss_table, selection_table
from lark_jax.report.table_one import difference_table
from lark_jax.report.templates import render
from lark_jax.runtime.files import atomic_path, write_text

FIGURE_NAMES = ("accuracy", "loss", "selections", "landscape")

SELECTION_CAPTION = (
    "Trajectories that are trained on. Left: the Jaccard index of every two selections, |A and B| / |A or B|, at one "
    "budget; at different budgets it cannot reach 1. Right: the part of the training weight that each teacher has."
)


@dataclass(frozen=True)
class _Plate:
    """A figure with its words."""

    figure: Figure
    title: str
    caption: str


def write_report(content: ReportContent, directory: str | Path) -> Path:
    """Writes `index.html` and, for each figure that has data, `accuracy.png`, `loss.png`, `selections.png`,
    `landscape.png`, and a page for pairs of students below `comparisons/`.

    Each file is replaced as a whole, the page last; equal content gives equal bytes. Returns the page's path.
    """
    directory = Path(directory)
    plates = _plates(content)
    for name in FIGURE_NAMES:
        if name in plates:
            with atomic_path(directory / f"{name}.png") as temporary:
                temporary.write_bytes(png_bytes(plates[name].figure))
        else:
            (directory / f"{name}.png").unlink(missing_ok=True)
    write_comparison_pages(content.comparison, directory)
    page = directory / "index.html"
    write_text(page, _render(content, plates))
    return page


def render_page(content: ReportContent) -> str:
    """The page's HTML."""
    return _render(content, _plates(content))


def _render(content: ReportContent, plates: dict[str, _Plate]) -> str:
    svgs = {name: svg_text(plate.figure, name, plate.title, plate.caption) for name, plate in plates.items()}
    return render(
        "page.html.j2",
        content=content,
        comparisons=FOLDER,
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
        skipped=[skipped_section(stage) for stage in content.stages],
        figures=svgs,
        figure_captions={name: plate.caption for name, plate in plates.items()},
    )


def _plates(content: ReportContent) -> dict[str, _Plate]:
    """The figures that have data, by name. A method has the same colour in all of them."""
    tuned = [result.method for result in content.results if result.budget is not None]
    styles = method_styles([*tuned, *(curve.method for curve in content.curves)])
    plates = {}
    if content.results:
        figure = accuracy_figure(content.results, styles)
        plates["accuracy"] = _Plate(figure, "Accuracy by method and budget", _accuracy_figure_caption(content))
    if content.curves:
        figure = loss_figure(content.curves, styles)
        plates["loss"] = _Plate(figure, "Loss by trajectories and by tokens", _loss_caption(content))
    if content.selections:
        figure = selection_figure(content.selections)
        plates["selections"] = _Plate(figure, "Overlap and teachers of the selections", SELECTION_CAPTION)
    if content.landscape and content.landscape.candidates:
        caption = _landscape_caption(content.landscape)
        plates["landscape"] = _Plate(landscape_figure(content.landscape), "Scores of one problem's candidates", caption)
    return plates


def _loss_caption(content: ReportContent) -> str:
    caption = (
        "Training loss of each run, weighted as in Eq. 1, against the trajectories and the target tokens that the "
        "student had seen: pale, every optimizer step; strong, the trailing mean over 1/20 of the run. Runs train on "
        "different trajectories, so the height of these curves does not rank the methods."
    )
    if any(curve.held_out for curve in content.curves):
        caption += (
            " Below, the unweighted loss on one random trajectory of each held-out problem, the same for all runs. "
            "It says how well a student predicts the pool's average answer, which is what random selection trains for; "
            "accuracy is what counts."
        )
    return caption


def _accuracy_caption(content: ReportContent) -> str:
    caption = "Accuracy in percent: mean ± sample standard deviation over decoding seeds."
    return f"{caption} Interval: {content.interval_note}." if content.interval_note else caption


def _differences_caption(content: ReportContent) -> str:
    caption = (
        "Acc@k of one student minus that of another on the same problems, in percentage points; problems on which it "
        "does better or worse, counted over all seeds."
    )
    if not content.interval_note:
        return caption
    return f"{caption} Interval: {content.interval_note}, drawn for both together."


def _accuracy_figure_caption(content: ReportContent) -> str:
    caption = (
        "Mean accuracy over decoding seeds by selection method and budget B (trajectories per problem); the dashed "
        "line is the student before fine-tuning. Thick bars with caps: ± one standard deviation over seeds."
    )
    if any(result.interval for result in content.results):
        caption += f" Thin lines: {content.interval_note or 'confidence interval'}."
    return caption


def _landscape_caption(landscape: Landscape) -> str:
    return (
        f"Learnability score ĝ of all {len(landscape.candidates)} candidates of problem {landscape.problem_id}, "
        f"grouped by teacher; .1, .2, ... are a teacher's rollouts. Red border: selected by {landscape.method} at "
        f"B={landscape.budget}, with the candidate's weight in the loss."
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
