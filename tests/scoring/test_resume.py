"""Killed anywhere, any number of times, scoring ends with the same bytes; shares of the work make the same table."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_work import OPTIONS, Material, costless_step, small_mesh, write_material

from lark_jax.errors import PipelineError
from lark_jax.rendering.batching import TokenRows
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.scoring import (
    CandidateScore,
    assemble_scores,
    read_scores,
    score_pool,
    score_share,
    scorer,
    write_scores,
)
from lark_jax.scoring.part_files import read_finished
from lark_jax.scoring.statistics import TrajectoryMeans


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("synthetic"))


class Steps:
    """Counts the batches that are computed; may die before one of them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.dies_at: int | None = None

    def __call__(self, batch: TokenRows) -> TrajectoryMeans:
        if len(self.seen) == self.dies_at:
            raise Killed
        self.seen.append(tuple(batch.tokens_bt.sum(-1).tolist()))
        return costless_step(batch)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    counted = Steps()
    monkeypatch.setattr("lark_jax.scoring.scorer.make_score_step", lambda *_, **__: counted)
    monkeypatch.setattr("lark_jax.scoring.part_files.SECONDS_BETWEEN_FRAGMENTS", 0.0)
    return counted


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets so many files be written and then no more, as when the process is gone."""

    def allow(files: int) -> None:
        left = itertools.count(files, -1)

        def write(path: Path, scores: list[CandidateScore]) -> None:
            if next(left) <= 0:
                raise Killed
            write_scores(path, scores)

        monkeypatch.setattr("lark_jax.scoring.part_files.write_scores", write)

    return allow


def run(material: Material, directory: Path, **arguments) -> bytes:
    workload = material.workload(directory)
    score_share(material.student, workload, mesh=small_mesh(), **arguments)
    return table(material, directory)


def table(material: Material, directory: Path) -> bytes:
    write_scores(directory / "table.parquet", assemble_scores(material.workload(directory)))
    return (directory / "table.parquet").read_bytes()


def fragments(directory: Path) -> list[Path]:
    return sorted(directory.rglob("batches-*.parquet"))


def killed_amid_a_part(material: Material, directory: Path, steps: Steps) -> Path:
    """A folder below `directory` with a finished part and fragments of another one."""
    for dies_at in itertools.count(OPTIONS.batches_per_part + 2):
        folder = directory / str(dies_at)
        steps.dies_at, steps.seen = dies_at, []
        with pytest.raises(Killed):
            run(material, folder)
        if fragments(folder) and list(folder.glob("parts-*/part-*.parquet")):
            steps.dies_at = None
            return folder
    raise AssertionError


def test_killed_before_any_batch_the_next_run_computes_only_what_is_missing(
    material: Material, tmp_path: Path, steps: Steps
) -> None:
    undisturbed = run(material, tmp_path / "undisturbed")
    batches = len(steps.seen)
    assert len(material.workload(tmp_path).parts) > 2
    for dies_at in range(0, batches, 3):
        steps.seen, steps.dies_at = [], dies_at
        with pytest.raises(Killed):
            run(material, tmp_path / str(dies_at))
        steps.dies_at = None
        assert run(material, tmp_path / str(dies_at)) == undisturbed
        # What was in flight is computed again, everything that had come back is not.
        assert batches <= len(steps.seen) <= batches + 3
        assert not fragments(tmp_path / str(dies_at))


def test_killed_again_and_again_at_random_moments_it_still_ends_with_the_same_bytes(
    material: Material, tmp_path: Path, steps: Steps, writer: Callable[[int], None]
) -> None:
    undisturbed = run(material, tmp_path / "undisturbed")
    for attempt in itertools.count():
        assert attempt < 100
        steps.seen, steps.dies_at = [], random.randint(2, 8)
        writer(random.randint(1, 6))
        try:
            killed = run(material, tmp_path / "killed")
        except Killed:
            continue
        break
    assert attempt > 2
    assert killed == undisturbed


def test_a_run_that_has_finished_computes_and_tokenizes_nothing(
    material: Material, tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(material, tmp_path)
    steps.seen = []
    monkeypatch.setattr("lark_jax.scoring.workload.render_trajectories", None)
    monkeypatch.setattr("lark_jax.rendering.token_counts.render_trajectories", None)
    assert run(material, tmp_path) == first
    assert steps.seen == []


@pytest.mark.parametrize("damage", ["cut", "foreign", "misnamed"])
@pytest.mark.parametrize("what", ["part", "fragment"])
def test_a_damaged_or_foreign_file_is_said_and_computed_again(
    material: Material, tmp_path: Path, steps: Steps, capsys: pytest.CaptureFixture[str], damage: str, what: str
) -> None:
    undisturbed = run(material, tmp_path / "undisturbed")
    killed = killed_amid_a_part(material, tmp_path, steps)
    victim = (fragments(killed) if what == "fragment" else sorted(killed.glob("parts-*/part-*.parquet")))[0]
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-30])
    elif damage == "foreign":
        write_scores(victim, read_scores(victim)[::-1])
    else:
        other = "batches-00900-00901.parquet" if what == "fragment" else "part-00001.parquet"
        victim.rename(victim.with_name(other))
    assert run(material, killed) == undisturbed
    said = capsys.readouterr().err
    assert "scoring " + ("this part again" if what == "part" else "these batches again") in said
    assert victim.parent.name in said


def test_shares_partition_the_work_and_three_workers_make_the_table_of_one(
    material: Material, tmp_path: Path, steps: Steps
) -> None:
    alone = run(material, tmp_path / "alone")
    batches, steps.seen = sorted(steps.seen), []
    workload = material.workload(tmp_path / "three")
    for index in (2, 0):
        score_share(material.student, workload, mesh=small_mesh(), share=Share(index, 3))
    with pytest.raises(PipelineError, match=r"parts of the score table are missing.*part-00001\.parquet: not there"):
        assemble_scores(workload)
    score_share(material.student, workload, mesh=small_mesh(), share=Share(1, 3))
    assert table(material, tmp_path / "three") == alone
    assert sorted(steps.seen) == batches


def test_one_worker_goes_on_where_three_were_killed(material: Material, tmp_path: Path, steps: Steps) -> None:
    undisturbed = run(material, tmp_path / "undisturbed")
    for index in range(3):
        steps.seen, steps.dies_at = [], 5
        with pytest.raises(Killed):
            run(material, tmp_path, share=Share(index, 3))
    steps.dies_at, steps.seen = None, []
    assert run(material, tmp_path) == undisturbed
    batches = sum(len(part.batches) for part in material.workload(tmp_path).parts)
    assert len(steps.seen) <= batches - 3 * (5 - 3)  # at most three batches of each were in flight


@pytest.mark.usefixtures("steps")
def test_a_process_that_does_not_write_computes_the_same_and_leaves_no_file(material: Material, tmp_path: Path) -> None:
    workload = material.workload(tmp_path)
    done = score_share(material.student, workload, mesh=small_mesh(), writes=False)
    assert done.tokens == sum(workload.lengths)
    assert not workload.folder.exists()


def test_another_number_of_devices_takes_over_no_scores(material: Material, tmp_path: Path, steps: Steps) -> None:
    run(material, tmp_path)
    computed, steps.seen = len(steps.seen), []
    workload = material.workload(tmp_path, data_shards=1)
    score_share(material.student, workload, mesh=small_mesh(1))
    assert len(steps.seen) > computed


@pytest.mark.usefixtures("steps")
def test_what_cannot_be_rendered_has_its_reason_in_the_table(material: Material, tmp_path: Path) -> None:
    mesh = small_mesh()
    scores = score_pool(
        material.student, material.pool, material.chat, mesh=mesh, options=OPTIONS, parts_directory=tmp_path
    )
    assert [score.name for score in scores] == [trajectory.name for trajectory in material.pool.trajectories]
    assert [index for index, score in enumerate(scores) if score.status == "skipped"] == [2]
    assert "control_token" in scores[2].reason
    assert np.isnan(scores[2].statistics["loss"])


def test_batches_stay_in_flight_while_results_are_fetched(
    material: Material, tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No result is waited for before later batches, also of the next part, are on their way."""
    ahead: list[int] = []
    fetch = scorer._fetched

    def counting(batch, means):
        ahead.append(len(steps.seen) - len(ahead))
        return fetch(batch, means)

    monkeypatch.setattr(scorer, "_fetched", counting)
    monkeypatch.setattr(scorer.Stopwatch, "is_new", lambda *_: False)
    run(material, tmp_path)
    assert set(ahead[:-2]) == {scorer.BATCHES_IN_FLIGHT + 1}


def test_before_a_shape_is_compiled_all_that_was_computed_is_on_disk(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling may take a minute: a kill then loses nothing, and no batch is in flight meanwhile."""
    workload = material.workload(tmp_path)
    on_disk: list[int] = []
    shapes: list[tuple[int, ...]] = []

    def step(batch: TokenRows) -> TrajectoryMeans:
        if batch.tokens_bt.shape not in shapes:
            finished = read_finished(workload, EVERYTHING)
            parts = [len(workload.parts[number].batches) for number in finished.parts]
            on_disk.append(sum(parts) + sum(map(len, finished.batches.values())) - len(shapes))
        shapes.append(batch.tokens_bt.shape)
        return costless_step(batch)

    monkeypatch.setattr("lark_jax.scoring.scorer.make_score_step", lambda *_, **__: step)
    monkeypatch.setattr("lark_jax.scoring.part_files.SECONDS_BETWEEN_FRAGMENTS", 1e9)
    score_share(material.student, workload, mesh=small_mesh())
    assert len(on_disk) == len(set(shapes)) > 2
    assert set(on_disk) == {0}
