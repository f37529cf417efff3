"""Figures that explain a finished run. A diagnostic is a module with one function, and one line of `DIAGNOSTICS`."""

from collections.abc import Callable

from lark_jax.diagnostics import landscape, selections
from lark_jax.diagnostics.contract import FinishedSelection, Material
from lark_jax.report.content import Section

# By name, in the order of the report. The name is also that of the files (`report/<name>.png` and `.json`) and of the
# section's link on the page. A function returns None if the run lacks what it needs.
DIAGNOSTICS: dict[str, Callable[[Material], Section | None]] = {
    "selections": selections.compute,
    "landscape": landscape.compute,
}


def compute_sections(material: Material) -> dict[str, Section]:
    """The sections of all diagnostics that the run has the data for."""
    found = {name: compute(material) for name, compute in DIAGNOSTICS.items()}
    return {name: section for name, section in found.items() if section is not None}


__all__ = ["DIAGNOSTICS", "FinishedSelection", "Material", "compute_sections"]
