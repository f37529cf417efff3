"""Losses as figure and table: against trajectories and tokens seen."""

import math

import numpy as np
import pytest
from report_parts import texts

from lark_jax.report.losses import CurvePoint, LossCurve, loss_figure, loss_table, trailing_mean
from lark_jax.report.style import PALETTE, method_styles
from lark_jax.report.table import MISSING


def points(*losses: float) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(step, 16 * step, 900 * step, loss) for step, loss in enumerate(losses, start=1))


def test_every_run_is_in_the_legend_once_and_methods_keep_their_colour() -> None:
    curves = [LossCurve(m, b, points(1.0, 0.5, 0.4)) for m in ("lark", "random") for b in (1, 3)]
    figure = loss_figure(curves, method_styles(["lark", "random"]))
    words = texts(figure)
    assert all(words.count(curve.label) == 1 for curve in curves)
    assert len(figure.axes) == 2
    assert {line.get_color() for line in figure.axes[0].lines} == set(PALETTE[:2])


def test_losses_are_plotted_at_the_trajectories_and_tokens_seen() -> None:
    """One run has longer trajectories: by tokens it ends further right than by trajectories."""
    first = LossCurve("lark", 1, points(1.0, 0.5), held_out=(CurvePoint(0, 0, 0, 3.0), CurvePoint(2, 32, 1800, 2.0)))
    second = LossCurve("random", 1, (CurvePoint(1, 16, 300, 0.9),), held_out=(CurvePoint(1, 16, 300, 2.5),))
    figure = loss_figure([first, second], method_styles(["lark", "random"]))
    by_trajectories, by_tokens, held_out_by_trajectories, held_out_by_tokens = figure.axes
    lines = {axes: [line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes}
    assert [[16, 1.0], [32, 0.5]] in lines[by_trajectories]
    assert [[900, 1.0], [1800, 0.5]] in lines[by_tokens]
    assert [[16, 0.9]] in lines[by_trajectories]
    assert [[300, 0.9]] in lines[by_tokens]
    assert lines[held_out_by_trajectories] == [[[0, 3.0], [32, 2.0]], [[16, 2.5]]]
    assert lines[held_out_by_tokens] == [[[0, 3.0], [1800, 2.0]], [[300, 2.5]]]
    assert all(word in texts(figure) for word in ("trajectories seen", "target tokens seen", "held-out loss"))


@pytest.mark.parametrize("losses", [(), (1.0,), (1.0, math.nan, 0.5)])
@pytest.mark.parametrize("held_out", [(), (1.0,), (math.nan, 2.0)])
def test_loss_extremes_are_drawable(losses: tuple[float, ...], held_out: tuple[float, ...]) -> None:
    curve = LossCurve("lark", 1, points(*losses), points(*held_out))
    assert "lark B=1" in texts(loss_figure([curve], method_styles(["lark"])))


def test_trailing_mean_never_looks_ahead() -> None:
    losses = np.random.default_rng().standard_normal(130)
    smoothed = trailing_mean(losses)
    for i in (0, 1, 5, 6, 7, 129):
        assert smoothed[i] == pytest.approx(losses[max(0, i - 5) : i + 1].mean())
    np.testing.assert_array_equal(trailing_mean(losses[:39]), losses[:39])


def test_the_loss_table_shows_what_was_seen_and_the_lowest_held_out_loss() -> None:
    training = (CurvePoint(1, 64, 5_000, 1.5), CurvePoint(2, 100, 8_000, 1.25))
    held_out = (CurvePoint(0, 0, 0, 2.0), CurvePoint(1, 64, 5_000, 1.75), CurvePoint(2, 100, 8_000, 1.8))
    table = loss_table([LossCurve("lark", 3, training, held_out), LossCurve("grape", 1, (), ())])
    assert table.header[-3:] == ("held out before", "lowest (step)", "after")
    assert table.rows == (
        ("lark", "3", "2", "100", "8,000", "1.5000", "1.2500", "2.0000", "1.7500 (1)", "1.8000"),
        ("grape", "1", "0", "0", "0", MISSING, MISSING, MISSING, MISSING, MISSING),
    )
    assert len(loss_table([LossCurve("lark", 3, training)]).header) == 7
