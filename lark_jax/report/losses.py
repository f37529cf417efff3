"""Training and held-out losses of the runs of one experiment: table and figure. Losses are in nats per token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from lark_jax.report.style import DASHES, MethodStyle, Plate, drawing_style, new_figure, quiet_axes, short
from lark_jax.report.table import MISSING, Table, budget_cell, student_label


@dataclass(frozen=True)
class CurvePoint:
    """A loss, and how far the student had been trained at that point."""

    step: int  # completed optimizer steps
    trajectories: int  # seen so far; a trajectory seen twice counts twice
    target_tokens: int  # seen so far
    loss: float


@dataclass(frozen=True)
class LossCurve:
    """The losses of one run."""

    method: str
    budget: int | None
    training: tuple[CurvePoint, ...]  # weighted loss of each step
    held_out: tuple[CurvePoint, ...] = ()  # unweighted loss, on the same trajectories for all runs

    @property
    def label(self) -> str:
        return student_label(self.method, self.budget)


def loss_table(curves: Sequence[LossCurve]) -> Table:
    """One row per run: its training data, first and last training loss, and held-out loss if there is one."""
    header = ["method", "B", "steps", "trajectories", "target tokens", "first loss", "last loss"]
    if any(curve.held_out for curve in curves):
        header += ["held out before", "lowest (step)", "after"]
    rows = []
    for curve in curves:
        last = curve.training[-1] if curve.training else CurvePoint(0, 0, 0, 0.0)
        row = [curve.method, budget_cell(curve.budget)]
        row += [f"{count:,}" for count in (len(curve.training), last.trajectories, last.target_tokens)]
        row += [_loss_cell(curve.training[:1]), _loss_cell(curve.training[-1:])]
        if len(header) > len(row):
            lowest = min(curve.held_out, key=lambda point: point.loss, default=None)
            row.append(_loss_cell(curve.held_out[:1]))
            row.append(MISSING if lowest is None else f"{lowest.loss:.4f} ({lowest.step:,})")
            row.append(_loss_cell(curve.held_out[-1:]))
        rows.append(tuple(row))
    return Table(tuple(header), tuple(rows), (False,) + (True,) * (len(header) - 1))


def _loss_cell(point: Sequence[CurvePoint]) -> str:
    return f"{point[0].loss:.4f}" if point else MISSING


def loss_plate(curves: Sequence[LossCurve], styles: Mapping[str, MethodStyle]) -> Plate:
    caption = (
        "Training loss of each run, weighted as in Eq. 1, by trajectories and target tokens seen. Pale: every "
        "optimizer step; strong: trailing mean over 1/20 of the run. Runs train on different trajectories, so these "
        "curves do not rank the methods."
    )
    if any(curve.held_out for curve in curves):
        caption += (
            " Below: the unweighted loss on one random trajectory of each held-out problem, the same for all runs. "
            "It measures how well a student predicts the pool's average answer, which is what random selection trains "
            "for; compare methods by accuracy instead."
        )
    return Plate(loss_figure(curves, styles), "Loss by trajectories and by tokens", caption)


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


def trailing_mean(losses: np.ndarray) -> np.ndarray:
    """Mean of each value [steps] and those before it, over a window of 1/20 of the length (at least one value)."""
    window = max(1, len(losses) // 20)
    return np.asarray([losses[max(0, end - window) : end].mean() for end in range(1, len(losses) + 1)])


def _draw_training_loss(row: Sequence[Axes], curve: LossCurve, colour: str, dash: str) -> None:
    losses = np.asarray([point.loss for point in curve.training], dtype=float)
    marker = "o" if len(losses) == 1 else None
    for axes, seen in zip(row, _seen(curve.training), strict=True):
        axes.plot(seen, losses, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(seen, trailing_mean(losses), dash, color=colour, marker=marker, label=short(curve.label))


def _draw_held_out_loss(row: Sequence[Axes], curve: LossCurve, colour: str, dash: str) -> None:
    losses = [point.loss for point in curve.held_out]
    for axes, seen in zip(row, _seen(curve.held_out), strict=True):
        axes.plot(seen, losses, dash, color=colour, marker="o", markersize=3.5)


def _seen(points: Sequence[CurvePoint]) -> tuple[list[int], list[int]]:
    """The two horizontal axes."""
    return [point.trajectories for point in points], [point.target_tokens for point in points]
