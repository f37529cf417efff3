"""The plan of a scoring run: padding within its bound, each trajectory once, the same in every process."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_work import OPTIONS, Material, write_material

from lark_jax.errors import PipelineError
from lark_jax.pool import read_pool
from lark_jax.pool.records import Pool
from lark_jax.rendering.batching import plan_batches
from lark_jax.rendering.buckets import choose_buckets
from lark_jax.rendering.chat import RenderedTrajectory, load_chat_format, render_trajectories
from lark_jax.rendering.token_counts import count_inputs
from lark_jax.runtime import files
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.scoring import ScoreOptions, Workload, plan_workload
from lark_jax.scoring.workload import MOST_PADDING, render_part


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lark_jax.rendering.token_counts.CHARACTERS_PER_CHUNK", 500)


def padding_of(workload: Workload, lengths: list[int]) -> float:
    """Counted slot by slot, from lengths that the plan did not make itself."""
    slots = sum(np.ones((batch.rows, batch.length)).sum() for part in workload.parts for batch in part.batches)
    return 1 - sum(lengths) / slots


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 1.0), st.sampled_from([1, 4, 8]))
def test_log_normal_lengths_are_padded_within_the_bound(seed: int, spread: float, devices: int):
    draw = np.random.default_rng(seed).lognormal(7.5, spread, 3_000 * devices)
    lengths = draw.clip(16, 32_767).astype(int).tolist()
    ladder = choose_buckets(lengths, 8_192, devices, MOST_PADDING)
    plans = plan_batches(lengths, 8_192, devices, ladder)
    assert 1 - sum(lengths) / sum(plan.rows * plan.length for plan in plans) <= MOST_PADDING
    assert len({(plan.rows, plan.length) for plan in plans}) == len({plan.length for plan in plans}) <= len(ladder)


def test_few_batches_get_few_shapes():
    lengths = np.random.default_rng().integers(100, 4_000, 20).tolist()
    ladder = choose_buckets(lengths, 32_768, 8, MOST_PADDING)
    assert len(plan_batches(lengths, 32_768, 8, ladder)) == len(ladder) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("tokens_per_batch", "devices"), [(8_192, 1), (32_768, 1), (32_768, 8)])
def test_a_published_pool_is_padded_within_the_bound(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory, tokens_per_batch: int, devices: int
) -> None:
    pool = read_pool(shared_data / "pool" / "math_l5.jsonl")
    chat = load_chat_format(shared_data / "tokenizers" / "minimind")
    options = ScoreOptions(max_length=32_768, tokens_per_batch=tokens_per_batch, vocab_chunk=4_096)
    counted = tmp_path_factory.getbasetemp() / "math_l5"  # shared by the three cases
    workload = plan_workload(pool, chat, options, data_shards=devices, directory=counted)
    sample = np.random.default_rng().choice(len(pool.trajectories), 200, replace=False)
    rendered = render_trajectories(chat, [pool.trajectories[index] for index in sample], 32_768)
    assert [workload.lengths[index] for index in sample] == [item.num_inputs for item in rendered]
    assert padding_of(workload, list(workload.lengths)) == pytest.approx(workload.padding)
    assert workload.padding <= MOST_PADDING
    assert len(workload.ladder) <= 45


def test_every_trajectory_is_in_one_part_and_in_one_batch_if_it_can_be_rendered(material: Material, tmp_path: Path):
    workload = material.workload(tmp_path)
    members = [member for part in workload.parts for member in part.members]
    assert sorted(members) == list(range(len(material.pool.trajectories)))
    in_batches = [part.members[member] for part in workload.parts for batch in part.batches for member in batch.members]
    assert sorted(in_batches) == [index for index in range(len(members)) if index != 2]
    assert [part.number for part in workload.parts] == list(range(len(workload.parts)))


def test_rows_fit_their_batches_and_the_longest_come_first(material: Material, tmp_path: Path):
    workload = material.workload(tmp_path)
    batches = [batch for part in workload.parts for batch in part.batches]
    assert [batch.length for batch in batches] == sorted((batch.length for batch in batches), reverse=True)
    for part in workload.parts:
        rendered = render_part(workload, part, {})
        assert len(rendered.rows) == part.num_scorable
        for batch in part.batches:
            assert max(rendered.rows[member].num_inputs for member in batch.members) <= batch.length
            assert batch.rows % 2 == 0


def test_lengths_are_those_of_the_rendered_trajectories(material: Material, tmp_path: Path):
    items = render_trajectories(material.chat, material.pool.trajectories, OPTIONS.max_length)
    expected = [item.num_inputs if isinstance(item, RenderedTrajectory) else 0 for item in items]
    assert list(material.workload(tmp_path).lengths) == expected


def test_the_plan_is_the_same_again_and_in_another_folder(material: Material, tmp_path: Path):
    first, again, elsewhere = (material.workload(tmp_path / name) for name in ("a", "a", "b"))
    assert first.parts == again.parts == elsewhere.parts
    assert first.folder == again.folder
    assert first.folder.name == elsewhere.folder.name


@pytest.mark.parametrize(
    "change",
    [
        lambda m: plan_workload(m.pool, m.chat, OPTIONS, data_shards=4, directory=Path("unused")),
        lambda m: plan_workload(
            m.pool, m.chat, dataclasses.replace(OPTIONS, tokens_per_batch=512), data_shards=2, directory=Path("unused")
        ),
        lambda m: plan_workload(
            Pool(m.pool.trajectories[::-1]), m.chat, OPTIONS, data_shards=2, directory=Path("unused")
        ),
        lambda m: plan_workload(
            Pool(m.pool.trajectories[1:]), m.chat, OPTIONS, data_shards=2, directory=Path("unused")
        ),
    ],
    ids=["devices", "tokens_per_batch", "order", "fewer"],
)
def test_whatever_changes_the_batches_changes_the_folder(material: Material, tmp_path: Path, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert change(material).folder.name != material.workload(tmp_path).folder.name


def test_a_text_of_the_same_length_is_another_text(material: Material, tmp_path: Path):
    first, *rest = material.pool.trajectories
    answer = dataclasses.replace(first.messages[-1], content=first.response[::-1])
    changed = dataclasses.replace(first, messages=(*first.prompt, answer))
    other = dataclasses.replace(material, pool=Pool((changed, *rest)))
    assert other.workload(tmp_path).folder != material.workload(tmp_path).folder


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_count_goes_on_and_workers_take_over_each_others_chunks(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = (material.pool, material.chat, OPTIONS.max_length)
    expected = count_inputs(*arguments, folder=tmp_path / "whole", share=EVERYTHING)
    chunks = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(chunks) > 3
    written: list[str] = []

    def write_one_and_die(path: Path, value: object) -> None:
        write_json(path, value)
        written.append(path.name)
        raise InterruptedError

    write_json = files.write_json
    monkeypatch.setattr("lark_jax.runtime.files.write_json", write_one_and_die)
    for worker in range(len(chunks)):
        with pytest.raises(InterruptedError):
            count_inputs(*arguments, folder=tmp_path / "killed", share=Share(worker % 3, 3))
    assert sorted(written) == chunks
    assert count_inputs(*arguments, folder=tmp_path / "killed", share=EVERYTHING) == expected


def test_damaged_counts_are_said_and_made_again(material: Material, tmp_path: Path, capsys):
    workload = material.workload(tmp_path)
    negative = str([-1] * len(workload.lengths))
    for damage in ("[1, 2", "[1, 2]", "{}", negative):
        (file,) = tmp_path.glob("lengths-*/*.json")
        file.write_text(damage)
        assert material.workload(tmp_path).lengths == workload.lengths
        assert f"{file}: damaged; counting these tokens again" in capsys.readouterr().err


def test_counts_of_other_texts_are_refused_in_one_line(material: Material, tmp_path: Path):
    workload = material.workload(tmp_path)
    other = dataclasses.replace(workload, lengths=tuple(length + 1 for length in workload.lengths))
    with pytest.raises(PipelineError, match="holds other token counts than this pool's; delete it") as caught:
        render_part(other, other.parts[0], {})
    assert "\n" not in str(caught.value)


def test_a_pool_of_which_nothing_can_be_rendered_is_one_part_without_batches(material: Material, tmp_path: Path):
    nothing = dataclasses.replace(material, pool=Pool(material.pool.trajectories[2:3]))
    (part,) = nothing.workload(tmp_path).parts
    assert (part.members, part.batches) == ((0,), ())
    assert nothing.workload(tmp_path).padding == 0.0
