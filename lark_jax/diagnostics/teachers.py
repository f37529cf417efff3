"""How well the student predicts each teacher: the mean probability of the target tokens."""

import numpy as np
from matplotlib.figure import Figure

from lark_jax.diagnostics.contract import Material
from lark_jax.report.content import Section
from lark_jax.report.style import PALETTE, Plate, drawing_style, new_figure, quiet_axes, short
from lark_jax.report.table import Table


def compute(material: Material) -> Section | None:
    if material.scores is None:
        return None
    codes, teachers = material.scores.encoded("teacher")
    probabilities = material.scores.numbers("target_prob")
    means = {teacher: float(np.nanmean(probabilities[codes == code])) for code, teacher in enumerate(teachers)}
    rows = tuple((teacher, f"{mean:.4f}") for teacher, mean in means.items())
    return Section(
        link="Teachers",
        title="Teachers",
        plate=Plate(_figure(means), "Target probability by teacher", "Mean probability of the target tokens."),
        table=Table(("teacher", "mean target_prob"), rows, (False, True)),
        table_caption="The values of the figure.",
        values=means,
    )


def _figure(means: dict[str, float]) -> Figure:
    with drawing_style():
        figure = new_figure(6.5, 0.4 * len(means) + 1.0)
        axes = figure.subplots()
        axes.barh([short(teacher) for teacher in means], list(means.values()), color=PALETTE[0])
        axes.set_xlabel("mean target probability")
        quiet_axes(axes, "x")
    return figure
