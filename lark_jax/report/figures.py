"""The report's three figures: accuracy, training and held-out loss, and the g_hat landscape of one problem."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from lark_jax.report.content import AccuracyResult, CurvePoint, Landscape, LandscapeCandidate, LossCurve
from lark_jax.report.style import (
    DASHES,
    GRID,
    HIGHLIGHT,
    INK,
    MUTED,
    QUIET,
    MethodStyle,
    drawing_style,
    new_figure,
    quiet_axes,
    short,
)

_PANELS_PER_ROW = 2
_BAR_SLOT = 0.8  # share of the distance between two budgets that bars fill


def accuracy_figure(results: Sequence[AccuracyResult], styles: Mapping[str, MethodStyle]) -> Figure:
    """One panel per benchmark: bars by budget and method, the base student as a line (error bars: `_draw_error`)."""
    benchmarks = list(dict.fromkeys(result.benchmark for result in results))
    columns = min(len(benchmarks), _PANELS_PER_ROW)
    rows = math.ceil(len(benchmarks) / columns)
    bars_per_panel = len({(result.method, result.budget) for result in results})
    panel_width = max(3.2, 0.5 * bars_per_panel + 1.2)
    with drawing_style():
        figure = new_figure(max(6.5, panel_width * columns), 3.4 * rows + 0.4)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, benchmark in zip(grid.flat, benchmarks, strict=False):
            _draw_accuracy_panel(axes, [result for result in results if result.benchmark == benchmark], styles)
        for axes in grid.flat[len(benchmarks) :]:
            axes.set_axis_off()
        _shared_legend(figure, grid)
    return figure


def loss_figure(curves: Sequence[LossCurve], styles: Mapping[str, MethodStyle]) -> Figure:
    """Losses of every run by trajectories seen (left) and by tokens seen (right).

    Top: the training loss of each step, pale, and its trailing mean over 1/20 of the run. Bottom: the held-out loss, if
    there is one.
    """
    has_held_out = any(curve.held_out for curve in curves)
    budgets = list(dict.fromkeys(curve.budget for curve in curves))
    with drawing_style():
        figure = new_figure(10.0, 6.6 if has_held_out else 3.8)
        grid = figure.subplots(2 if has_held_out else 1, 2, squeeze=False, sharey="row", sharex="col")
        for curve in curves:
            colour, dash = styles[curve.method].colour, DASHES[budgets.index(curve.budget) % len(DASHES)]
            _draw_training_loss(grid[0], curve, colour, dash)
            if has_held_out:
                _draw_held_out_loss(grid[1], curve, colour, dash)
        for axes in grid.flat:
            quiet_axes(axes, "y")
        grid[0, 0].set_ylabel("training loss (nats per token)")
        if has_held_out:
            grid[1, 0].set_ylabel("held-out loss (nats per token)")
        for axes, label in zip(grid[-1], ("trajectories seen", "target tokens seen"), strict=True):
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", handlelength=2.6)
    return figure


def landscape_figure(landscape: Landscape) -> Figure:
    """g_hat of every candidate, grouped by teacher; selected ones with a red border and their weight (Figure 9)."""
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


def trailing_mean(losses: np.ndarray) -> np.ndarray:
    """Mean of each value [steps] and those before it, over a window of 1/20 of the length (at least one value)."""
    window = max(1, len(losses) // 20)
    return np.asarray([losses[max(0, end - window) : end].mean() for end in range(1, len(losses) + 1)])


def _draw_training_loss(row: Sequence[Axes], curve: LossCurve, colour: str, dash: str) -> None:
    losses = np.asarray([point.loss for point in curve.training], dtype=float)
    marker = "o" if len(losses) == 1 else None
    for axes, seen in zip(row, _seen(curve.training), strict=True):
        axes.plot(seen, losses, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(seen, trailing_mean(losses), dash, color=colour, marker=marker, label=short(curve.student))


def _draw_held_out_loss(row: Sequence[Axes], curve: LossCurve, colour: str, dash: str) -> None:
    losses = [point.loss for point in curve.held_out]
    for axes, seen in zip(row, _seen(curve.held_out), strict=True):
        axes.plot(seen, losses, dash, color=colour, marker="o", markersize=3.5)


def _seen(points: Sequence[CurvePoint]) -> tuple[list[int], list[int]]:
    """The two horizontal axes."""
    return [point.trajectories for point in points], [point.target_tokens for point in points]


def _draw_accuracy_panel(axes: Axes, results: Sequence[AccuracyResult], styles: Mapping[str, MethodStyle]) -> None:
    measured = [result for result in results if math.isfinite(result.mean)]
    tuned = [result for result in results if result.budget is not None]
    budgets = sorted({result.budget for result in tuned if result.budget is not None})
    methods = [method for method in styles if any(result.method == method for result in tuned)]
    width = _BAR_SLOT / max(1, len(methods))
    for result in measured:
        if result.budget is None:
            _draw_base(axes, result)
            continue
        offset = (methods.index(result.method) - (len(methods) - 1) / 2) * width
        _draw_bar(axes, budgets.index(result.budget) + offset, 0.88 * width, result, styles[result.method])
    axes.set_xticks(range(len(budgets)), [f"B={budget}" for budget in budgets])
    axes.set_xlim(-0.6, max(0, len(budgets) - 1) + 0.6)
    axes.set_ylim(0, _upper_limit(measured))
    axes.set_title(f"{short(results[0].benchmark)}  (n={results[0].num_problems:,})", loc="left", color=INK)
    axes.set_ylabel(f"Acc@{results[0].samples} (%)")
    quiet_axes(axes, "y")


def _draw_base(axes: Axes, result: AccuracyResult) -> None:
    mean = 100 * result.mean
    if result.spread is not None:
        low, high = mean - 100 * result.spread, mean + 100 * result.spread
        axes.axhspan(low, high, color=MUTED, alpha=0.18, linewidth=0, zorder=0)
    axes.axhline(mean, color=INK, linewidth=1.2, linestyle="--", zorder=3, label=f"{short(result.student)} student")
    axes.annotate(
        f"{mean:.1f}",
        (1, mean),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )


def _draw_bar(axes: Axes, position: float, width: float, result: AccuracyResult, style: MethodStyle) -> None:
    mean = 100 * result.mean
    axes.bar(
        position,
        mean,
        width,
        color=style.colour,
        hatch=style.hatch,
        edgecolor="white" if style.hatch else style.colour,
        linewidth=0,
        label=short(result.method),
    )
    top = _draw_error(axes, position, result)
    axes.annotate(f"{mean:.1f}", (position, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)


def _draw_error(axes: Axes, position: float, result: AccuracyResult) -> float:
    """Thick with caps: ± one standard deviation over seeds. Thin: the confidence interval. Returns the upper end."""
    mean = 100 * result.mean
    top = mean
    if result.interval is not None and all(math.isfinite(end) for end in result.interval):
        low, high = (100 * end for end in result.interval)
        axes.plot((position, position), (low, high), color=INK, linewidth=0.9)
        top = max(top, high)
    if result.spread is not None:
        spread = 100 * result.spread
        axes.errorbar(position, mean, spread, color=INK, linewidth=2.0, capsize=3, capthick=1.2)
        top = max(top, mean + spread)
    return top


def _upper_limit(results: Sequence[AccuracyResult]) -> float:
    tops = [result.mean + (result.spread or 0.0) for result in results]
    tops += [result.interval[1] for result in results if result.interval and math.isfinite(result.interval[1])]
    return 118 * max(tops, default=1.0) or 1.0


def _shared_legend(figure: Figure, grid: np.ndarray) -> None:
    """One legend above all panels, with every label once."""
    entries: dict[str, Artist] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside upper left", ncols=min(5, len(entries)))


def _score_limits(candidates: Sequence[LandscapeCandidate]) -> tuple[float, float]:
    """Limits that include zero and every finite score, with room for the vertical weight labels."""
    scores = [candidate.score for candidate in candidates if math.isfinite(candidate.score)]
    low, high = min([0.0, *scores]), max([0.0, *scores])
    span = (high - low) or 1.0
    return low - (0.05 * span if low < 0 else 0.0), high + 0.22 * span


def _draw_candidate(axes: Axes, position: float, candidate: LandscapeCandidate) -> None:
    if not math.isfinite(candidate.score):
        axes.plot(position, 0, marker="x", color=MUTED)
        return
    border, line_width = (HIGHLIGHT, 2.0) if candidate.selected else (QUIET, 0.0)
    axes.bar(position, candidate.score, 0.86, color=QUIET, edgecolor=border, linewidth=line_width, zorder=3)
    if candidate.selected:
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
    axes: Axes, groups: Mapping[str, Sequence[LandscapeCandidate]], positions: Sequence[float] | np.ndarray
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
