"""Parts of reports for tests: evaluated students, and the texts in a figure."""

import xml.etree.ElementTree as ElementTree

from matplotlib.figure import Figure

from lark_jax.evaluation.accuracy import Accuracy, BenchmarkResult
from lark_jax.report.accuracy import EvaluatedStudent
from lark_jax.report.style import svg_text


def evaluated(
    method: str, budget: int | None, mean: float, std: float | None = 0.01, *benchmarks: str, num_problems: int = 50
) -> EvaluatedStudent:
    """A student with the same Acc@5 on all `benchmarks`, by default one called "b"; one seed if `std` is None."""
    seeds = (0,) if std is None else (0, 1, 2)
    accuracy = Accuracy(5, (mean,) * len(seeds), mean, std, mean - 0.1, mean + 0.1)
    results = (
        BenchmarkResult(name, name, num_problems, 5, seeds, (accuracy,), (), 0, 0, 1.0, ())
        for name in benchmarks or ("b",)
    )
    return EvaluatedStudent("model", method, budget, tuple(results))


def parsed(figure: Figure) -> ElementTree.Element:
    return ElementTree.fromstring(svg_text(figure, "name", "A <title>", "A description & more"))


def texts(figure: Figure) -> str:
    return " ".join("".join(element.itertext()) for element in parsed(figure).iter() if element.tag.endswith("text"))
