"""The report names the software of the stages that made the results, not of the process that wrote the page."""

import dataclasses
from pathlib import Path

from lark_jax.config import experiment_from_mapping
from lark_jax.runtime import environment
from lark_jax.runtime.environment import software_of
from lark_jax.runtime.files import write_json
from lark_jax.runtime.pipeline import MANIFEST, Manifest, Outcome
from lark_jax.stages.layout import Layout
from lark_jax.stages.report import gather


def test_one_version_is_one_row() -> None:
    ran = [(task, {"jax": "0.10.2", "numpy": "2.1"}) for task in ("score", "select/lark_B1", "report")]
    assert list(software_of(ran)) == [("jax", "0.10.2"), ("numpy", "2.1")]


def test_different_versions_are_rows_with_the_stages_or_tasks_that_had_them() -> None:
    ran = [
        ("score/statistics", {"code": "old", "jax": "0.10.2"}),
        ("score", {"code": "old", "jax": "0.10.2"}),
        ("finetune/lark_B1", {"code": "old", "jax": "0.10.2"}),
        ("finetune/lark_B3", {"code": "new", "jax": "0.10.2"}),
        ("report", {"code": "new", "jax": "0.10.2", "vllm": "0.32"}),
    ]
    assert list(software_of(ran)) == [
        ("code in score, finetune/lark_B1", "old"),
        ("code in finetune/lark_B3, report", "new"),
        ("jax", "0.10.2"),
        ("vllm in score, finetune", "none recorded"),
        ("vllm in report", "0.32"),
    ]


def test_the_report_takes_versions_from_manifests(tmp_path: Path) -> None:
    experiment = experiment_from_mapping(
        {
            "workdir": str(tmp_path),
            "student": {"path": "student"},
            "pool": {"path": "pool.jsonl"},
            "evaluate": {"benchmarks": ("own.json",)},
        }
    )
    layout, here = Layout.of(experiment), environment.package_versions()
    earlier = {
        "score/statistics": layout.statistics,
        "export/lark_B3": layout.export(layout.runs[0]),
        "evaluate/benchmarks": layout.evaluation("benchmarks"),
    }
    for name, folder in earlier.items():
        manifest = Manifest(name, "", {}, {}, Outcome({}), {**here, "lark_jax code": "earlier"}, "1 x TPU")
        write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    shown = {setting.name: setting.value for setting in gather(experiment, layout).versions}
    assert shown["lark_jax code in score, export, evaluate"] == "earlier"
    assert shown["lark_jax code in report"] == here["lark_jax code"]
    assert shown["jax"] == here["jax"]
