"""Shares of work, and a single process, which decides by itself and never waits."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.config import DistributedConfig, Experiment, experiment_from_mapping
from lark_jax.errors import ConfigError
from lark_jax.run import execute
from lark_jax.runtime import processes, terminal
from lark_jax.runtime.clusters import ALONE
from lark_jax.runtime.processes import Share
from lark_jax.stages import check_stages
from lark_jax.stages.report import settings_of

VALUES = {"workdir": "x", "student": {"path": "s"}, "pool": {"path": "p"}}


@given(items=st.integers(0, 200), count=st.integers(1, 9))
def test_shares_are_a_partition_and_differ_by_one_at_most(items: int, count: int) -> None:
    taken = [[item for item in range(items) if Share(index, count).takes(item)] for index in range(count)]
    assert sorted(item for share in taken for item in share) == list(range(items))
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_a_single_process_is_the_first_and_never_waits() -> None:
    assert (processes.index(), processes.count(), processes.is_first(), processes.label()) == (0, 1, True, "")
    with processes.joined(ALONE, DistributedConfig()):
        processes.barrier("anything")
        assert processes.decided_by_first("anything", lambda: [1, "a"]) == [1, "a"]
    assert processes.announce_failure("anything")
    processes.end(2)  # returns, since there is no other process


def test_only_the_first_process_narrates_and_every_process_warns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.distributed.global_state, "process_id", 1)
    monkeypatch.setattr(processes.distributed.global_state, "num_processes", 2)
    terminal.say("narration")
    with terminal.progress_bar(what="work", total=2, unit="item") as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    terminal.warn("look here")
    assert capsys.readouterr().err == "[lark_jax 2/2] look here\n"


def experiment_with(**values: object) -> Experiment:
    return experiment_from_mapping({**VALUES, "evaluate": {"benchmarks": ("b.json",)}, **values})


def test_stages_of_one_process_are_refused_in_several_with_those_that_can_run() -> None:
    with pytest.raises(
        ConfigError, match=r"stages: export run in one process.*--config\.stages=score,select,finetune here"
    ):
        check_stages(experiment_with(stages=("score", "select", "finetune", "export")), 2)
    with pytest.raises(ConfigError, match=r"--config\.stages=score,select here"):
        check_stages(experiment_with(stages=("export",)), 2)
    check_stages(experiment_with(), 1)
    check_stages(experiment_with(stages=("score", "select", "finetune", "evaluate", "report")), 2)


def test_the_report_does_not_depend_on_the_processes() -> None:
    single = experiment_with()
    one_of_two = experiment_with(distributed={"coordinator": "host:1", "num_processes": 2, "process_id": 1})
    assert single != one_of_two
    assert settings_of(single) == settings_of(one_of_two)
    assert "mesh.data" in settings_of(single)


def test_a_value_in_place_of_a_section_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute({**VALUES, "workdir": str(tmp_path), "distributed": 3}) == 2
    assert capsys.readouterr().err == "error: config.distributed: expected a section with fields, got 3\n"
