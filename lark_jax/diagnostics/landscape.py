"""The g_hat landscape: LARK's scores and weights for all candidates of one problem (Figure 9 of the paper)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lark_jax.diagnostics.contract import Material
from lark_jax.report.comparison import excerpt
from lark_jax.report.content import LongText, Section
from lark_jax.report.style import GRID, HIGHLIGHT, MUTED, QUIET, Plate, drawing_style, new_figure, quiet_axes, short
from lark_jax.report.table import MISSING, Table
from lark_jax.scoring import ScoreTable
from lark_jax.selection import METHODS, method_scores, select_trajectories


@dataclass(frozen=True)
class Candidate:
    candidate_id: str
    teacher: str
    score: float  # g_hat; NaN if the candidate could not be scored
    weight: float | None  # None: not selected


@dataclass(frozen=True)
class Landscape:
    """All candidates of one problem under LARK at one budget."""

    problem_id: str
    budget: int
    candidates: tuple[Candidate, ...]

    def by_teacher(self) -> dict[str, tuple[Candidate, ...]]:
        """Teachers in order of first appearance, each with its candidates in the given order."""
        groups: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            groups.setdefault(candidate.teacher, []).append(candidate)
        return {teacher: tuple(group) for teacher, group in groups.items()}


def compute(material: Material) -> Section | None:
    if material.scores is None:
        return None
    landscape = landscape_of(material.scores, material.budgets, material.seed)
    problem = material.open_pool().by_problem()[landscape.problem_id]
    responses = {trajectory.candidate_id: excerpt(trajectory.response) for trajectory in problem}
    selected = [candidate for candidate in landscape.candidates if candidate.weight is not None]
    selected.sort(key=lambda candidate: -(candidate.weight or 0.0))
    caption = (
        f"Learnability score ĝ of all {len(landscape.candidates)} candidates of problem {landscape.problem_id}, "
        "grouped by teacher; .1, .2, ... number a teacher's rollouts. Red border: selected by lark at "
        f"B={landscape.budget}, labelled with the weight in the loss."
    )
    return Section(
        link="One problem",
        title="One problem and its candidates",
        opening=LongText(
            f"Problem {landscape.problem_id}", excerpt("\n\n".join(message.content for message in problem[0].prompt))
        ),
        plate=Plate(landscape_figure(landscape), "Scores of one problem's candidates", caption),
        texts_title="Selected trajectories",
        texts=tuple(
            LongText(
                f"{c.teacher}, {c.candidate_id}: weight {c.weight:.4f}, ĝ {c.score:.5f}", responses[c.candidate_id]
            )
            for c in selected
        ),
        table=landscape_table(landscape),
        table_title=f"Scores of all {len(landscape.candidates)} candidates",
        table_caption="Candidates in the order of the figure. Weights of one problem sum to 1.",
        values=_values(landscape),
    )


def landscape_of(scores: ScoreTable, budgets: Sequence[int], seed: int) -> Landscape:
    """The first problem, in table order, whose weights differ; the first one if there is none.

    The budget is the largest of `budgets` that leaves a threshold candidate, or 1.
    """
    lark, most_candidates = METHODS["lark"], int(np.bincount(scores.codes("problem_id")).max())
    budget = max((budget for budget in budgets if budget < most_candidates), default=1)
    weights: dict[str, dict[str, float]] = {}  # by problem and candidate
    for choice in select_trajectories(scores, lark, budget, seed).choices:
        weights.setdefault(choice.problem_id, {})[choice.candidate_id] = choice.weight
    problem_id = next((name for name, own in weights.items() if np.ptp([*own.values()]) > 1e-6), next(iter(weights)))
    chosen, of_problem = weights[problem_id], scores.only(problem_id)
    rows = zip(of_problem.rows(), method_scores(of_problem, lark, seed), strict=True)
    candidates = (Candidate(row.candidate_id, row.teacher, g_hat, chosen.get(row.candidate_id)) for row, g_hat in rows)
    return Landscape(problem_id, budget, tuple(candidates))


def _values(landscape: Landscape) -> dict[str, object]:
    values = dataclasses.asdict(landscape)
    for candidate in values["candidates"]:
        candidate["score"] = candidate["score"] if math.isfinite(candidate["score"]) else None
    return values


def landscape_table(landscape: Landscape) -> Table:
    rows = tuple(
        (
            teacher,
            candidate.candidate_id,
            f"{candidate.score:.5f}" if math.isfinite(candidate.score) else "not scored",
            MISSING if candidate.weight is None else f"{candidate.weight:.4f}",
        )
        for teacher, group in landscape.by_teacher().items()
        for candidate in group
    )
    return Table(("teacher", "candidate", "score ĝ", "weight"), rows, (False, False, True, True))


def landscape_figure(landscape: Landscape) -> Figure:
    """g_hat of every candidate, grouped by teacher; selected ones with a red border and their weight."""
    groups = landscape.by_teacher()
    candidates = [candidate for group in groups.values() for candidate in group]
    gaps = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    positions = np.arange(len(candidates)) + 0.9 * gaps
    with drawing_style():
        figure = new_figure(max(6.5, 0.24 * float(positions.max()) + 1.6), 4.0)
        axes = figure.subplots()
        for position, candidate in zip(positions, candidates, strict=True):
            _draw_candidate(axes, float(position), candidate)
        _label_teachers(axes, groups, positions)
        quiet_axes(axes, "y")
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_ylim(*_score_limits(candidates))
        axes.set_xlim(-0.9, float(positions.max()) + 0.9)
        axes.set_ylabel("learnability score ĝ")
    return figure


def _score_limits(candidates: Sequence[Candidate]) -> tuple[float, float]:
    """Limits that include zero and every finite score, with room for the vertical weight labels."""
    scores = [candidate.score for candidate in candidates if math.isfinite(candidate.score)]
    low, high = min([0.0, *scores]), max([0.0, *scores])
    span = (high - low) or 1.0
    return low - (0.05 * span if low < 0 else 0.0), high + 0.22 * span


def _draw_candidate(axes: Axes, position: float, candidate: Candidate) -> None:
    if not math.isfinite(candidate.score):
        axes.plot(position, 0, marker="x", color=MUTED)
        return
    border, line_width = (QUIET, 0.0) if candidate.weight is None else (HIGHLIGHT, 2.0)
    axes.bar(position, candidate.score, 0.86, color=QUIET, edgecolor=border, linewidth=line_width, zorder=3)
    if candidate.weight is not None:
        axes.annotate(
            f"{candidate.weight:.3f}",
            (position, max(candidate.score, 0.0)),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=90,
            fontsize=9,
            fontweight="bold",
            color=HIGHLIGHT,
        )


def _label_teachers(
    axes: Axes, groups: Mapping[str, Sequence[Candidate]], positions: Sequence[float] | np.ndarray
) -> None:
    """Rollout numbers .1, .2, ... under the bars, teachers' names below them, a line between teachers."""
    rollouts = [f".{number}" for group in groups.values() for number in range(1, len(group) + 1)]
    axes.set_xticks(positions, rollouts, fontsize=7, color=MUTED)
    first = 0
    centres = []
    for group in groups.values():
        last = first + len(group) - 1
        centres.append((positions[first] + positions[last]) / 2)
        if first:
            axes.axvline((positions[first - 1] + positions[first]) / 2, color=GRID, linewidth=0.8, zorder=0)
        first = last + 1
    names = axes.secondary_xaxis(location=-0.055)
    names.set_xticks(centres, [short(teacher) for teacher in groups], rotation=32, ha="right", fontsize=9)
    names.tick_params(length=0)
    names.spines["bottom"].set_visible(False)
