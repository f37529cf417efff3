"""Tasks run once, run again when an input changes, and continue after an interruption."""

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lark_jax.errors import PipelineError
from lark_jax.runtime.pipeline import Outcome, Task, read_manifest, require_current, require_manifest, run_tasks


class Worker:
    """Writes its inputs into a file, and counts its calls."""

    def __init__(self, directory: Path, inputs: dict[str, Any]) -> None:
        self.directory = directory
        self.inputs = inputs
        self.calls = 0
        self.seen_at_start: list[str] = []

    def task(self, interrupt: Callable[[], None] = lambda: None) -> Task:
        def run(directory: Path) -> Outcome:
            self.calls += 1
            self.seen_at_start = sorted(file.name for file in directory.iterdir())
            (directory / "part-0").write_text("finished part")
            interrupt()
            (directory / "result").write_text(repr(self.inputs))
            return Outcome(counts={"records": 3}, skipped=[{"problem_id": "7", "reason": "empty_answer"}])

        return Task("work", self.directory, lambda: self.inputs, run)


def test_a_broken_start_record_says_what_to_delete(tmp_path: Path) -> None:
    (tmp_path / "started.json").write_text("{")
    with pytest.raises(PipelineError, match="delete"):
        run_tasks([Task("work", tmp_path, dict, lambda _: Outcome(counts={}))])


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path / "work", {"seed": 1, "section": {"rate": 0.5, "names": ("a", "b")}})


def test_a_finished_task_is_not_run_again(worker: Worker) -> None:
    assert run_tasks([worker.task()]) == 1
    assert run_tasks([worker.task()]) == 0
    assert worker.calls == 1


def test_the_manifest_holds_inputs_outputs_counts_skipped_records_and_versions(worker: Worker) -> None:
    run_tasks([worker.task()])
    manifest = require_manifest(worker.directory, "work")
    assert manifest.hardware
    assert manifest.inputs["section"] == {"rate": 0.5, "names": ["a", "b"]}
    assert manifest.outputs == {"part-0": 13, "result": len(repr(worker.inputs))}
    assert manifest.outcome.counts == {"records": 3}
    assert manifest.outcome.skipped == [{"problem_id": "7", "reason": "empty_answer"}]
    assert {"python", "jax", "numpy"} <= set(manifest.versions)


def test_a_changed_input_clears_the_folder_and_is_named(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    run_tasks([worker.task()])
    worker.inputs = {"seed": 1, "section": {"rate": 0.25, "names": ("a", "b")}}
    assert run_tasks([worker.task()]) == 1
    assert worker.seen_at_start == ["started.json"]
    assert "section.rate changed" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_output_is_computed_again(worker: Worker, damage: str) -> None:
    run_tasks([worker.task()])
    result = worker.directory / "result"
    expected = result.read_text()
    if damage == "missing":
        result.unlink()
    else:
        result.write_text(expected[:-1])
    assert run_tasks([worker.task()]) == 1
    assert result.read_text() == expected


def test_a_lost_output_keeps_the_scratch_that_saves_work(worker: Worker) -> None:
    def with_scratch() -> Task:
        return dataclasses.replace(worker.task(), scratch=("part-0",))

    run_tasks([with_scratch()])
    (worker.directory / "result").unlink()
    assert run_tasks([with_scratch()]) == 1
    assert worker.seen_at_start == ["part-0", "started.json"]
    assert read_manifest(worker.directory) is not None
    worker.inputs = {"seed": 2}
    assert run_tasks([with_scratch()]) == 1
    assert worker.seen_at_start == ["started.json"]  # of other inputs


def _fail_once() -> Callable[[], None]:
    outcomes: Iterator[bool] = itertools.chain([True], itertools.repeat(False))

    def interrupt() -> None:
        if next(outcomes):
            raise KeyboardInterrupt

    return interrupt


def test_an_interrupted_task_finds_its_own_files_when_it_is_run_again(worker: Worker) -> None:
    interrupt = _fail_once()
    with pytest.raises(KeyboardInterrupt):
        run_tasks([worker.task(interrupt)])
    assert read_manifest(worker.directory) is None
    assert run_tasks([worker.task(interrupt)]) == 1
    assert worker.seen_at_start == ["part-0", "started.json"]
    assert (worker.directory / "result").is_file()


def test_files_of_an_interrupted_task_with_other_inputs_are_removed(worker: Worker) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_tasks([worker.task(_fail_once())])
    worker.inputs = {"seed": 2}
    run_tasks([worker.task()])
    assert worker.seen_at_start == ["started.json"]


def test_what_changed_since_an_interrupted_run_is_named(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_tasks([worker.task(_fail_once())])
    worker.inputs = {"seed": 2, "section": {"rate": 0.5, "names": ("a", "b")}}
    run_tasks([worker.task()])
    assert "seed changed" in capsys.readouterr().err


def test_foreign_files_are_never_removed(worker: Worker) -> None:
    worker.directory.mkdir()
    (worker.directory / "thesis.tex").write_text("years of work")
    with pytest.raises(PipelineError, match="not from this program"):
        run_tasks([worker.task()])
    assert (worker.directory / "thesis.tex").read_text() == "years of work"


def test_scratch_folders_may_be_deleted_afterwards(worker: Worker) -> None:
    def fill() -> None:
        (worker.directory / "checkpoints").mkdir()
        (worker.directory / "checkpoints" / "large").write_text("x" * 100)

    task = dataclasses.replace(worker.task(fill), scratch=("checkpoints",))
    run_tasks([task])
    shutil.rmtree(worker.directory / "checkpoints")
    assert run_tasks([task]) == 0


def test_building_on_a_result_of_other_inputs_is_refused(worker: Worker) -> None:
    require_current(worker.task())  # never run: the tasks that need it will say so
    run_tasks([worker.task()])
    require_current(worker.task())
    worker.inputs = {"seed": 2, "section": {"rate": 0.5, "names": ("a", "b")}}
    with pytest.raises(PipelineError, match="seed changed since this was computed; add 'work'"):
        require_current(worker.task())


def test_half_written_files_of_a_killed_process_are_removed(worker: Worker) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_tasks([worker.task(_fail_once())])
    (worker.directory / ".result.partial-123").write_text("half")
    run_tasks([worker.task()])
    assert not list(worker.directory.glob(".*partial*"))


def test_inputs_are_read_after_earlier_tasks_have_run(tmp_path: Path) -> None:
    first = tmp_path / "first"

    def write(directory: Path) -> Outcome:
        (directory / "value").write_text("1")
        return Outcome(counts={})

    def copy(directory: Path) -> Outcome:
        (directory / "copy").write_text((first / "value").read_text())
        return Outcome(counts={})

    tasks = [
        Task("first", first, dict, write),
        Task("second", tmp_path / "second", lambda: {"value": (first / "value").read_text()}, copy),
    ]
    assert run_tasks(tasks) == 2
    assert run_tasks(tasks) == 0


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"add 'score' to config\.stages"):
        require_manifest(tmp_path / "score", "score")


def test_a_broken_manifest_says_what_to_delete(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(PipelineError, match="delete"):
        read_manifest(tmp_path)


def test_later_stages_ignore_what_is_installed(worker: Worker) -> None:
    def task() -> Task:
        return dataclasses.replace(worker.task(), environment=("installed",))

    worker.inputs = {"seed": 1, "installed": {"engine": "1.0"}}
    run_tasks([task()])
    worker.inputs = {"seed": 1, "installed": {"engine": "2.0"}}
    require_current(task())
    assert run_tasks([task()]) == 1  # it is to the stage itself
    worker.inputs = {"seed": 2, "installed": {"engine": "2.0"}}
    with pytest.raises(PipelineError, match="seed changed"):
        require_current(task())
