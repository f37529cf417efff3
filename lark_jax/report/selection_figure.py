"""The figure of the selections: how much they overlap, and whose trajectories they contain."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lark_jax.report.content import SelectionComparison
from lark_jax.report.style import INK, PALETTE, drawing_style, new_figure, quiet_axes, short

_SCALE = LinearSegmentedColormap.from_list("overlap", ["#f2f5f8", PALETTE[0]])
_TEACHERS_SHOWN = len(PALETTE) - 1  # by weight over all selections; the others are combined
_OTHERS = "others"
_DARK = 0.55  # overlap above which white numbers are easier to read


def selection_figure(comparison: SelectionComparison) -> Figure:
    """Left: the Jaccard index of every two selections. Right: each selection's teachers. Rows are aligned."""
    size = len(comparison.profiles)
    with drawing_style():
        extra = max(0.0, 0.3 * (size - 12))  # inches, so that the numbers in the cells do not touch
        figure = new_figure(10.5 + extra, max(3.0, 0.34 * size + 1.6))
        overlap, teachers = figure.subplots(1, 2, sharey=True, width_ratios=[4 + extra, 4])
        _draw_overlap(overlap, comparison)
        _draw_teachers(teachers, comparison)
        overlap.set_yticks(range(size), [short(profile.name) for profile in comparison.profiles])
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
    axes.set_xticks(range(size), [short(profile.name) for profile in comparison.profiles], rotation=90, fontsize=8)
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
    return sorted(total, key=lambda teacher: (-total[teacher], teacher))[:_TEACHERS_SHOWN]
