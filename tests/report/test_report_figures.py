"""Figures are valid XML, carry their data, and survive awkward content."""

import io
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from lark_jax.report.content import AccuracyResult, CurvePoint, Landscape, LandscapeCandidate, LossCurve
from lark_jax.report.figures import accuracy_figure, landscape_figure, loss_figure, trailing_mean
from lark_jax.report.style import HIGHLIGHT, PALETTE, method_styles, png_bytes, svg_text


def parsed(figure: Figure) -> ElementTree.Element:
    return ElementTree.fromstring(svg_text(figure, "name", "A <title>", "A description & more"))


def texts(figure: Figure) -> str:
    return " ".join("".join(element.itertext()) for element in parsed(figure).iter() if element.tag.endswith("text"))


def paper_landscape() -> Landscape:
    """The selected candidates of the paper's Appendix D.3."""
    selected = {
        "phi4-reason-plus.2": (0.01782, 0.478),
        "phi4-reason-plus.3": (0.01687, 0.387),
        "gptoss-20b-high.1": (0.01426, 0.136),
        "gptoss-120b-high.2": (0.01285, 0.0),
    }
    candidates = [
        LandscapeCandidate(
            f"{teacher}.{rollout}",
            teacher,
            *selected.get(f"{teacher}.{rollout}", (0.009, 0.0)),
            selected=selected.get(f"{teacher}.{rollout}", (0, 0.0))[1] > 0,
        )
        for teacher in ("gptoss-20b-high", "gptoss-120b-high", "phi4-reason-plus")
        for rollout in (1, 2, 3)
    ]
    return Landscape("839", "Find b . c.", "lark", 3, tuple(candidates))


def result(
    method: str, budget: int | None, mean: float, std: float | None = 0.01, benchmark: str = "b"
) -> AccuracyResult:
    return AccuracyResult(method, budget, benchmark, 5, 50, 3, mean, std, (mean - 0.1, mean + 0.1))


def test_bars_have_the_height_of_the_means_and_base_is_a_line() -> None:
    results = [result("base", None, 0.3), result("lark", 1, 0.41), result("random", 1, 0.35), result("lark", 3, 0.5)]
    figure = accuracy_figure(results, method_styles(["lark", "random"]))
    (axes,) = figure.axes
    heights = [patch.get_height() for container in axes.containers for patch in getattr(container, "patches", [])]
    assert sorted(heights) == pytest.approx([35.0, 41.0, 50.0])
    assert any(np.allclose(line.get_ydata(), 30.0) for line in axes.lines)
    assert "base student" in texts(figure)


def test_error_bars_end_at_mean_plus_and_minus_std() -> None:
    figure = accuracy_figure([result("lark", 1, 0.4, std=0.07)], method_styles(["lark"]))
    (bar,) = [container for container in figure.axes[0].containers if hasattr(container, "has_yerr")]
    segment = bar.lines[2][0].get_segments()[0]
    assert sorted(segment[:, 1]) == pytest.approx([33.0, 47.0])


@pytest.mark.parametrize("std", [None, math.nan])
def test_without_std_no_error_bar_is_drawn(std: float | None) -> None:
    figure = accuracy_figure([result("lark", 1, 0.4, std=std)], method_styles(["lark"]))
    assert not [container for container in figure.axes[0].containers if hasattr(container, "has_yerr")]


@pytest.mark.parametrize("means", [[0.0, 0.0], [1.0, 1.0], [math.nan, 0.5], [math.nan, math.nan]])
def test_accuracy_extremes_are_drawable(means: list[float]) -> None:
    results = [result("base", None, means[0]), result("lark", 2, means[1])]
    assert "B" in texts(accuracy_figure(results, method_styles(["lark"])))


def test_only_the_base_student_is_drawable() -> None:
    assert "30.0" in texts(accuracy_figure([result("base", None, 0.3)], {}))


def test_one_panel_per_benchmark() -> None:
    results = [result("lark", 1, 0.4, benchmark=f"bench {i}") for i in range(5)]
    figure = accuracy_figure(results, method_styles(["lark"]))
    assert [axes.get_title(loc="left").split("  ")[0] for axes in figure.axes if axes.axison] == [
        f"bench {i}" for i in range(5)
    ]


def test_selected_candidates_have_a_red_border_and_their_weight() -> None:
    figure = landscape_figure(paper_landscape())
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    red = [bar.get_height() for bar in bars if bar.get_linewidth() > 0]
    assert len(bars) == 9
    assert sorted(red) == pytest.approx([0.01426, 0.01687, 0.01782])
    words = texts(figure)
    for label in ("0.478", "0.387", "0.136", "phi4-reason-plus", "gptoss-20b-high", ".1", ".3"):
        assert label in words
    assert "0.000 " not in words
    assert HIGHLIGHT in svg_text(figure, "n", "t", "d")


def test_weight_labels_stay_inside_the_axes() -> None:
    figure = landscape_figure(paper_landscape())
    figure.draw_without_rendering()
    axes = figure.axes[0]
    top = axes.get_window_extent().y1
    labels = [text for text in axes.texts if text.get_text() in ("0.478", "0.387", "0.136")]
    assert len(labels) == 3
    assert all(label.get_window_extent().y1 <= top for label in labels)


@pytest.mark.parametrize("scores", [[0.0, 0.0], [-0.1, 0.2], [math.nan, 0.1], [math.nan, math.nan], [5.0]])
def test_landscape_extremes_are_drawable(scores: list[float]) -> None:
    candidates = tuple(LandscapeCandidate(f"c{i}", "t", score, 1.0, i == 0) for i, score in enumerate(scores))
    assert "t" in texts(landscape_figure(Landscape("1", "p", "lark", 1, candidates)))


def points(*losses: float) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(step, 16 * step, 900 * step, loss) for step, loss in enumerate(losses, start=1))


def test_every_run_is_in_the_legend_once_and_methods_keep_their_colour() -> None:
    curves = [LossCurve(m, b, points(1.0, 0.5, 0.4)) for m in ("lark", "random") for b in (1, 3)]
    figure = loss_figure(curves, method_styles(["lark", "random"]))
    words = texts(figure)
    assert all(words.count(curve.student) == 1 for curve in curves)
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


def test_names_with_markup_math_and_control_characters_stay_text() -> None:
    name = '<b>$\\frac{1}$ & \x00 "q" Ωμ'
    candidates = (LandscapeCandidate("c", name, 0.5, 1.0, True),)
    assert '<b>$\\frac{1}$ & \N{REPLACEMENT CHARACTER} "q" Ωμ' in texts(
        landscape_figure(Landscape("1", "p", "lark", 1, candidates))
    )


@pytest.mark.filterwarnings("error")
def test_long_names_are_cut_with_an_ellipsis() -> None:
    candidates = (LandscapeCandidate("c", "teacher" * 40, 0.5, 1.0, True),)
    words = texts(landscape_figure(Landscape("1", "p", "lark", 1, candidates)))
    assert "teacherteacherteacherteachertea…" in words
    assert "teacher" * 5 not in words


def test_svg_is_labelled_and_its_ids_carry_its_name() -> None:
    root = parsed(landscape_figure(paper_landscape()))
    title, description = root[0], root[1]
    assert title.text == "A <title>"
    assert description.text == "A description & more"
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert all(element.get("id", "name-").startswith("name-") for element in root.iter())


def test_methods_beyond_the_palette_differ_by_hatch() -> None:
    styles = method_styles([f"m{i}" for i in range(2 * len(PALETTE))])
    assert len(set(styles.values())) == 2 * len(PALETTE)


def test_png_is_an_opaque_picture() -> None:
    picture = imread(io.BytesIO(png_bytes(landscape_figure(paper_landscape()))), format="png")  # [rows, columns, rgba]
    assert picture.shape[1] > 800
    assert picture.shape[2] == 3 or picture[..., 3].min() == 1
    assert (picture[0, 0, :3] == 1).all()
