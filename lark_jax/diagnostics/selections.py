"""The comparison of selections: how much they overlap, how long their trajectories are, and from which teachers."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lark_jax.diagnostics.contract import FinishedSelection, Material
from lark_jax.report.content import Section
from lark_jax.report.style import INK, PALETTE, Plate, drawing_style, new_figure, quiet_axes, short
from lark_jax.report.table import MISSING, Table, student_label
from lark_jax.scoring import ScoreTable
from lark_jax.selection import Choice

_SCALE = LinearSegmentedColormap.from_list("overlap", ["#f2f5f8", PALETTE[0]])
_TEACHERS_SHOWN = len(PALETTE) - 1  # by weight over all selections; the others are combined
_OTHERS = "others"
_DARK = 0.55  # overlap above which white numbers are easier to read


@dataclass(frozen=True)
class Profile:
    """A summary of one selection."""

    method: str
    budget: int
    trajectories: int
    mean_tokens: float  # target tokens per trajectory, unweighted
    teachers: tuple[tuple[str, float], ...]  # name and share of the training weight

    @property
    def label(self) -> str:
        return student_label(self.method, self.budget)


@dataclass(frozen=True)
class SelectionComparison:
    profiles: tuple[Profile, ...]
    overlap: tuple[tuple[float, ...], ...]  # Jaccard index of the trajectories of every pair


def compute(material: Material) -> Section | None:
    """None for fewer than two selections."""
    if material.scores is None or len(material.selections) < 2:
        return None
    comparison = compare_selections(material.scores, material.selections)
    caption = (
        "The trajectories in each selection. Left: the Jaccard index |A and B| / |A or B| of every two selections; at "
        "different budgets it cannot reach 1. Right: each teacher's share of the training weight."
    )
    return Section(
        link="Selections",
        title="Selections",
        plate=Plate(selection_figure(comparison), "Overlap and teachers of the selections", caption),
        table=selection_table(comparison),
        table_caption="Training data of each selection. Mean tokens: target tokens per trajectory, unweighted. Most "
        "similar: among selections of the same budget.",
        values=dataclasses.asdict(comparison),
    )


def compare_selections(scores: ScoreTable, selections: Sequence[FinishedSelection]) -> SelectionComparison:
    """Compares selections that were made from the table `scores`."""
    rows = range(len(scores))
    ids = zip(*(scores.texts(name, rows) for name in ("problem_id", "candidate_id")), strict=True)
    tokens = dict(zip(ids, scores.numbers("num_target_tokens").tolist(), strict=True))
    profiles = tuple(
        Profile(
            selection.method,
            selection.budget,
            trajectories=len(selection.choices),
            mean_tokens=sum(tokens[c.problem_id, c.candidate_id] for c in selection.choices) / len(selection.choices),
            teachers=tuple(teacher_shares(selection.choices).items()),
        )
        for selection in selections
    )
    overlap = jaccard([selection.choices for selection in selections])
    return SelectionComparison(profiles, tuple(map(tuple, overlap.tolist())))


def jaccard(selections: Sequence[Sequence[Choice]]) -> np.ndarray:
    """|A and B| / |A or B| of the trajectories of each pair of selections, float64 [S, S]; 1 for two empty ones."""
    sets = [{(choice.problem_id, choice.candidate_id) for choice in choices} for choices in selections]
    overlap = np.ones((len(sets), len(sets)))
    for row, own in enumerate(sets):
        for column, other in enumerate(sets[:row]):
            either = len(own | other)
            overlap[row, column] = overlap[column, row] = len(own & other) / either if either else 1.0
    return overlap


def teacher_shares(choices: Iterable[Choice]) -> dict[str, float]:
    """Share of the training weight per teacher, teachers in alphabetical order."""
    weights: dict[str, float] = {}
    for choice in choices:
        weights[choice.teacher] = weights.get(choice.teacher, 0.0) + choice.weight
    total = sum(weights.values())
    return {teacher: weights[teacher] / total for teacher in sorted(weights)}


def selection_table(comparison: SelectionComparison) -> Table:
    """One row per selection: size, length, the teachers with the most weight, and the most similar selection."""
    header = ("method", "B", "trajectories", "mean tokens", "most weight", "most similar (Jaccard)")
    rows = tuple(
        (
            profile.method,
            str(profile.budget),
            f"{profile.trajectories:,}",
            f"{profile.mean_tokens:,.1f}",
            ", ".join(f"{teacher} {share:.0%}" for teacher, share in sorted(profile.teachers, key=_by_share)[:3]),
            _most_similar(comparison, index),
        )
        for index, profile in enumerate(comparison.profiles)
    )
    return Table(header, rows, (False, True, True, True, False, False))


def _by_share(teacher: tuple[str, float]) -> tuple[float, str]:
    return -teacher[1], teacher[0]


def _most_similar(comparison: SelectionComparison, index: int) -> str:
    """Among selections of the same budget: larger ones overlap more because of their size."""
    own = comparison.profiles[index]
    others = [
        (overlap, profile.method)
        for profile, overlap in zip(comparison.profiles, comparison.overlap[index], strict=True)
        if profile.budget == own.budget and profile is not own
    ]
    if not others:
        return MISSING
    overlap, method = max(others, key=lambda other: other[0])
    return f"{method} ({overlap:.2f})"


def selection_figure(comparison: SelectionComparison) -> Figure:
    """Left: the Jaccard index of every two selections. Right: each selection's teachers. Rows are aligned."""
    size = len(comparison.profiles)
    with drawing_style():
        extra = max(0.0, 0.3 * (size - 12))  # inches, so that the numbers in the cells do not touch
        figure = new_figure(10.5 + extra, max(3.0, 0.34 * size + 1.6))
        overlap, teachers = figure.subplots(1, 2, sharey=True, width_ratios=[4 + extra, 4])
        _draw_overlap(overlap, comparison)
        _draw_teachers(teachers, comparison)
        overlap.set_yticks(range(size), [short(profile.label) for profile in comparison.profiles])
        overlap.set_ylim(size - 0.5, -0.5)
    return figure


def _draw_overlap(axes: Axes, comparison: SelectionComparison) -> None:
    size = len(comparison.profiles)
    axes.pcolormesh(
        np.arange(size + 1) - 0.5, np.arange(size + 1) - 0.5, np.array(comparison.overlap), cmap=_SCALE, vmin=0, vmax=1
    )
    for row, values in enumerate(comparison.overlap):
        for column, value in enumerate(values):
            if row == column:
                continue
            colour = "white" if value > _DARK else "#1f2329"  # the cell's colour is the same in light and dark mode
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(size), [short(profile.label) for profile in comparison.profiles], rotation=90, fontsize=8)
    axes.set_title("overlap: Jaccard index (%)")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_teachers(axes: Axes, comparison: SelectionComparison) -> None:
    shown = _heaviest_teachers(comparison)
    left = np.zeros(len(comparison.profiles))
    shares = [dict(profile.teachers) for profile in comparison.profiles]
    for index, teacher in enumerate(shown):
        widths = np.array([100 * of_selection.get(teacher, 0.0) for of_selection in shares])
        axes.barh(range(len(shares)), widths, left=left, height=0.7, color=PALETTE[index], label=short(teacher))
        left += widths
    if (left < 99.95).any():
        axes.barh(range(len(shares)), 100 - left, left=left, height=0.7, color="none", edgecolor=INK, label=_OTHERS)
    axes.set_xlim(0, 100)
    axes.set_xlabel("training weight (%)")
    axes.set_title("teachers")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    quiet_axes(axes, "x")


def _heaviest_teachers(comparison: SelectionComparison) -> list[str]:
    total: dict[str, float] = {}
    for profile in comparison.profiles:
        for teacher, share in profile.teachers:
            total[teacher] = total.get(teacher, 0.0) + share
    return [teacher for teacher, _ in sorted(total.items(), key=_by_share)[:_TEACHERS_SHOWN]]
