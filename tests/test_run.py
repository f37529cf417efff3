"""`python -m lark_jax.run`: whatever is wrong with the inputs ends in one line, and stages are split by accelerator.

The modules' own tests go through what can be wrong with each input; here one case of each kind goes the whole way from
the configuration to the exit status.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lark_jax.config import SyntheticConfig
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.run import COMMAND, execute, split_stages
from lark_jax.runtime.command import EXIT_USER_ERROR
from lark_jax.students import random_student, read_architecture, save_new_student

ROOT = Path(__file__).resolve().parents[1]
SMALL = SyntheticConfig(
    num_problems=3, num_test_problems=2, num_pretrain_problems=40, hidden_size=64, num_layers=1, num_heads=2
)


@dataclass
class Files:
    """A valid experiment on disk that a case may break."""

    folder: Path
    values: dict[str, Any]

    @property
    def pool(self) -> Path:
        return self.folder / "pool.jsonl"

    @property
    def student(self) -> Path:
        return self.folder / "student"


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    write_synthetic(SMALL, 3, folder / "data")
    blank = folder / "data" / "student"
    save_new_student(random_student(read_architecture(blank), 0, "float32"), blank, folder / "student")
    shutil.copy(folder / "data" / "pool.jsonl", folder / "pool.jsonl")
    return folder


@pytest.fixture
def files(valid: Path, tmp_path: Path) -> Files:
    folder = tmp_path / "inputs"
    shutil.copytree(valid, folder)
    values = {
        "workdir": str(tmp_path / "run"),
        "stages": ("score",),
        "student": {"path": str(folder / "student"), "max_length": 256},
        "pool": {"path": str(folder / "pool.jsonl")},
        "score": {"dtype": "float32", "tokens_per_batch": 512},
    }
    return Files(folder, values)


def wrong_field(files: Files) -> None:
    files.values["finetune"] = {"lerning_rate": 1e-5}


def unknown_stage(files: Files) -> None:
    files.values["stages"] = ("score", "train")


def unknown_method(files: Files) -> None:
    files.values |= {"stages": ("select",), "select": {"methods": ("larks",)}}


def missing_student(files: Files) -> None:
    files.values["student"]["path"] = str(files.folder / "nowhere")


def wrong_mesh(files: Files) -> None:
    files.values["mesh"] = {"data": 4096}


def missing_pool(files: Files) -> None:
    files.values["pool"]["path"] = str(files.folder / "nowhere")


def bad_record(files: Files) -> None:
    files.pool.write_text(json.dumps({"problem_id": "1"}) + "\n" + files.pool.read_text())


def prompts_longer_than_the_limit(files: Files) -> None:
    files.values["student"]["max_length"] = 4


def broken_template(files: Files) -> None:
    template = files.folder / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}")
    files.values["student"]["chat_template"] = str(template)


def tokenizer_of_another_student(files: Files) -> None:
    path = files.student / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 100}))


def truncated_weights(files: Files) -> None:
    path = files.student / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def input_of_a_stage_that_never_ran(files: Files) -> None:
    files.values["stages"] = ("select",)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (wrong_field, ("finetune.lerning_rate", "unknown field", "learning_rate")),
        (unknown_stage, ("config.stages", "'train'", "'finetune'")),
        (unknown_method, ("larks", "lark")),
        (missing_student, ("config.student.path", "nowhere: no such file or folder")),
        (wrong_mesh, ("config.mesh", "devices")),
        (missing_pool, ("config.pool.path", "no such file or folder")),
        (bad_record, ("pool.jsonl:1", "candidate_id")),
        (prompts_longer_than_the_limit, ("none of", "could be scored")),
        (broken_template, ("template",)),
        (tokenizer_of_another_student, ("tokenizer", "vocab_size=100")),
        (truncated_weights, ("model.safetensors",)),
        (input_of_a_stage_that_never_ran, ("'score'", "config.stages")),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_wrong_inputs_end_in_one_line_before_anything_is_written(
    break_it: Callable[[Files], None], words: tuple[str, ...], files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    break_it(files)
    assert execute(files.values) == EXIT_USER_ERROR
    output = capfd.readouterr().err
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    for word in words:
        assert word in line, line
    assert not (Path(files.values["workdir"]) / "score" / "scores.parquet").exists()


def test_a_missing_benchmark_is_found_before_the_stages_that_come_first_run(
    files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {**files.values, "stages": ("score", "evaluate"), "evaluate": {"benchmarks": ("nowhere.json",)}}
    assert execute(values, only=("score",)) == EXIT_USER_ERROR
    assert "config.evaluate.benchmarks: nowhere.json: no such file" in capfd.readouterr().err
    assert not (Path(files.values["workdir"]) / "score").exists()


def test_finished_stages_survive_a_later_error(files: Files) -> None:
    assert execute(files.values) == 0
    scores = Path(files.values["workdir"]) / "score" / "scores.parquet"
    before = scores.read_bytes()
    assert execute({**files.values, "stages": ("score", "export")}) == EXIT_USER_ERROR
    assert scores.read_bytes() == before


@pytest.mark.parametrize("empty", ["--only=", "--only=,"])
def test_an_empty_only_does_not_mean_all_stages(
    empty: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lark_jax.run.execute", lambda *_, **__: pytest.fail("it runs"))
    assert COMMAND.main([f"--config={ROOT / 'configs' / 'tiny.py'}", empty]) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"error: {empty}: names no stage\n"


def test_with_only_the_other_stages_are_checked_and_not_run(files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    values = {**files.values, "stages": ("score", "select")}
    assert execute(values, only=("finetune",)) == EXIT_USER_ERROR
    assert "error: --only=finetune: expected some of config.stages score,select" in capfd.readouterr().err
    assert execute(values, only=("score",)) == 0
    assert not (Path(values["workdir"]) / "selection").exists()


def test_stages_are_split_by_their_need_of_the_accelerator() -> None:
    assert split_stages(("score,evaluate", "report")) == (("score",), ("evaluate", "report"))
    assert split_stages(("evaluate", "report")) == (("evaluate", "report"), ())
    assert split_stages(("score", "select")) == (("score", "select"), ())
