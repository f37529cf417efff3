"""Figures are valid XML, carry their data, and survive awkward names."""

import io

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from report_parts import parsed, texts

from lark_jax.report.style import PALETTE, drawing_style, method_styles, new_figure, png_bytes, short


def figure_of(name: str) -> Figure:
    with drawing_style():
        figure = new_figure(6.5, 4.0)
        axes: Axes = figure.subplots()
        axes.set_title(short(name))
    return figure


def test_names_with_markup_math_and_control_characters_stay_text() -> None:
    name = '<b>$\\frac{1}$ & \x00 "q" Ωμ'
    assert '<b>$\\frac{1}$ & \N{REPLACEMENT CHARACTER} "q" Ωμ' in texts(figure_of(name))


@pytest.mark.filterwarnings("error")
def test_long_names_are_cut_with_an_ellipsis() -> None:
    words = texts(figure_of("teacher" * 40))
    assert "teacherteacherteacherteachertea…" in words
    assert "teacher" * 5 not in words


def test_svg_is_labelled_and_its_ids_carry_its_name() -> None:
    root = parsed(figure_of("a"))
    title, description = root[0], root[1]
    assert title.text == "A <title>"
    assert description.text == "A description & more"
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert all(element.get("id", "name-").startswith("name-") for element in root.iter())


def test_methods_beyond_the_palette_differ_by_hatch() -> None:
    styles = method_styles([f"m{i}" for i in range(2 * len(PALETTE))])
    assert len(set(styles.values())) == 2 * len(PALETTE)


def test_png_is_an_opaque_picture() -> None:
    picture = imread(io.BytesIO(png_bytes(figure_of("a"))), format="png")  # [rows, columns, rgba]
    assert picture.shape[1] > 800
    assert picture.shape[2] == 3 or picture[..., 3].min() == 1
    assert (picture[0, 0, :3] == 1).all()
