"""Every layout of a pool gives the same trajectories; what is no pool is refused by file, line or item, and remedy."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_jax.config import ColumnsConfig, PoolConfig
from lark_jax.errors import ConfigError, PoolError
from lark_jax.pool import Pool, load_pool, read_pool
from lark_jax.pool.sources import is_hub_id, local_source

SYSTEM = "Think step by step."
TEACHERS, ROLLOUTS, PROBLEMS = ("deepseek-r1-0528", "qwq"), 3, 5


def turns(problem: int, answer: str) -> list[dict[str, str]]:
    question = f"What is {problem} + 1? “∑”"
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def answer(teacher: str, rollout: int, problem: int) -> str:
    return f'<think>{teacher} "{rollout}" {{\\[</think> \\boxed{{{problem + 1}}}'


def write_lists(folder: Path, name: str = "{teacher}/gen{rollout}.json") -> Path:
    """The layout of the published pool: a folder per teacher, a JSON list per rollout, aligned by item."""
    for teacher in TEACHERS:
        for rollout in range(ROLLOUTS):
            items = [{"messages": turns(number, answer(teacher, rollout, number))} for number in range(PROBLEMS)]
            path = folder / name.format(teacher=teacher, rollout=rollout)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(items, ensure_ascii=rollout == 0, indent=rollout or None), encoding="utf-8")
    return folder


def records() -> list[dict[str, Any]]:
    """The same pool as plain records."""
    return [
        {
            "problem_id": str(problem),
            "candidate_id": f"{teacher}.gen{rollout}",
            "teacher": teacher,
            "messages": turns(problem, answer(teacher, rollout, problem)),
        }
        for teacher in TEACHERS
        for rollout in range(ROLLOUTS)
        for problem in range(PROBLEMS)
    ]


def content(pool: Pool) -> list[tuple[Any, ...]]:
    return [(t.problem_id, t.candidate_id, t.teacher, t.messages) for t in pool.trajectories]


def write_jsonl(path: Path, items: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    conversation = [{"from": names[turn["role"]], "value": turn["content"]} for turn in record["messages"]]
    return {**{name: record[name] for name in record if name != "messages"}, "conversations": conversation}


def as_texts(record: dict[str, Any]) -> dict[str, Any]:
    system, user, assistant = (turn["content"] for turn in record["messages"])
    kept = {name: record[name] for name in record if name != "messages"}
    return {**kept, "system": system, "prompt": user, "response": assistant}


def saved_by_datasets(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(records()).save_to_disk(folder / "saved", num_shards=3)
    return folder / "saved"


def arrow_file(folder: Path) -> Path:
    table = pa.Table.from_pylist(records())
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return folder / "a.arrow"


def shards(folder: Path) -> Path:
    for number, start in enumerate(range(0, 30, 10)):
        table = pa.Table.from_pylist(records()[start : start + 10])
        (folder / "data").mkdir(exist_ok=True)
        pq.write_table(table, folder / "data" / f"train-{number:05d}-of-00003.parquet")
    (folder / "README.md").write_text("A dataset.")
    return folder


def one_list(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(records(), indent=1))
    return folder / "a.json"


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "a list per teacher and rollout": write_lists,
    "JSON lines": lambda folder: write_jsonl(folder / "a.jsonl", records()),
    "one JSON list": one_list,
    "ShareGPT": lambda folder: write_jsonl(folder / "a.jsonl", [sharegpt(record) for record in records()]),
    "prompt and response": lambda folder: write_jsonl(folder / "a.jsonl", [as_texts(record) for record in records()]),
    "parquet shards": shards,
    "Arrow file": arrow_file,
    "saved by datasets": saved_by_datasets,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_trajectories(layout: str, tmp_path: Path) -> None:
    pool = read_pool(LAYOUTS[layout](tmp_path))
    expected = [(r["problem_id"], r["candidate_id"], r["teacher"], r["messages"]) for r in records()]
    found = [(*rest, [{"role": m.role, "content": m.content} for m in messages]) for *rest, messages in content(pool)]
    assert found == [tuple(row) for row in expected]
    assert pool.skipped == ()


def test_every_file_of_a_hub_snapshot_that_is_not_read_is_named(tmp_path: Path) -> None:
    write_lists(tmp_path)
    write_jsonl(tmp_path / ".cache" / "hidden.jsonl", [])
    (tmp_path / "README.md").write_text("A dataset.")
    (tmp_path / "selected_by_rsr").mkdir()
    (tmp_path / "selected_by_rsr" / "rsr-min_for_student.json").write_text("[]")
    pool = read_pool(tmp_path)
    assert len(pool.trajectories) == 30
    assert pool.files_left_out == (
        "README.md (not a pool file)",
        "selected_by_rsr/rsr-min_for_student.json (pool.exclude)",
    )


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("{teacher}_gen{rollout}.json", None),
        ("x/{teacher}-run-{rollout}.json", "x/{teacher}-run-{rollout}.json"),
    ],
)
def test_teacher_and_rollout_come_from_the_file_name(tmp_path: Path, name: str, pattern: str | None) -> None:
    write_lists(tmp_path, name)
    pool = load_pool(PoolConfig(str(tmp_path), file_names=pattern))
    assert {trajectory.teacher for trajectory in pool.trajectories} == set(TEACHERS)
    assert len({trajectory.candidate_id for trajectory in pool.trajectories}) == 6


def test_a_file_name_without_the_teacher_is_refused(tmp_path: Path) -> None:
    """It is not rollout 2507 of a teacher called qwen3."""
    write_lists(tmp_path, "{teacher}_gen{rollout}.json")
    (tmp_path / "qwen3_2507.json").write_text("[]")
    with pytest.raises(PoolError, match=r"qwen3_2507\.json: the name does not give teacher.*config\.pool\.file_names"):
        read_pool(tmp_path)


def test_items_of_a_list_are_known_by_line_and_number(tmp_path: Path) -> None:
    folder = write_lists(tmp_path)
    lines = (folder / "qwq" / "gen2.json").read_text().splitlines()
    locations = [t.location for t in read_pool(folder).trajectories if t.candidate_id == "qwq.gen2"]
    starts = [number for number, line in enumerate(lines, start=1) if line == "  {"]
    assert locations == [f"{folder}/qwq/gen2.json:{line}: item {item}" for item, line in enumerate(starts)]


@pytest.mark.parametrize("first_read", [1, 2, 7, 64, 1000])
def test_lists_are_cut_alike_wherever_the_reads_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_read: int
) -> None:
    monkeypatch.setattr("lark_jax.pool.json_records._FIRST_READ", first_read)
    folder = write_lists(tmp_path)
    assert [t.response for t in read_pool(folder).trajectories] == [r["messages"][-1]["content"] for r in records()]


def test_lists_whose_items_name_their_problems_need_not_be_aligned(tmp_path: Path) -> None:
    for teacher, numbers in (("a", [3, 1]), ("b", [1, 2, 3])):
        items = [{"id": number, "messages": turns(number, teacher)} for number in numbers]
        (tmp_path / f"{teacher}_1.json").write_text(json.dumps(items))
    pool = load_pool(PoolConfig(str(tmp_path), columns=ColumnsConfig(problem_id="id")))
    assert {problem: len(group) for problem, group in pool.by_problem().items()} == {"3": 2, "1": 2, "2": 1}


def test_one_damaged_item_does_not_affect_the_others(tmp_path: Path) -> None:
    folder = write_lists(tmp_path)
    path = folder / "qwq" / "gen0.json"
    items = json.loads(path.read_text())
    texts = [json.dumps(item) for item in items]
    texts[1] = texts[1].replace("assistant", r"assist\x")
    texts[3] = texts[3].replace("user", "us@r")
    path.write_bytes(("[" + ",\n".join(texts) + "]").encode().replace(b"@", b"\xe9"))
    pool = read_pool(folder, on_bad_record="skip")
    assert len(pool.trajectories) == 28
    assert [record.location for record in pool.skipped] == [f"{path}:2: item 1", f"{path}:4: item 3"]
    assert "Invalid \\escape" in pool.skipped[0].reason
    assert "is not UTF-8 at byte" in pool.skipped[1].reason


# --- columns -----------------------------------------------------------------------------------------------------


def test_columns_of_other_names_are_read_by_their_mapping(tmp_path: Path) -> None:
    item = {"question": "2 + 2?", "solution": "4.", "id": 7, "run": "a", "model": "m", "gold": "4", "ok": True, "x": 1}
    columns = ColumnsConfig(
        problem_id="id",
        candidate_id="run",
        teacher="model",
        prompt="question",
        response="solution",
        answer="gold",
        correct="ok",
    )
    paths = [write_jsonl(tmp_path / "a.jsonl", [item]), tmp_path / "a.parquet"]
    pq.write_table(pa.Table.from_pylist([item]), paths[1])
    for path in paths:
        (found,) = load_pool(PoolConfig(str(path), columns=columns)).trajectories
        assert (found.name, found.teacher, found.answer, found.correct) == ("7/a", "m", "4", True)
        assert [(m.role, m.content) for m in found.messages] == [("user", "2 + 2?"), ("assistant", "4.")]
        assert dict(found.meta) == {"x": 1}


def test_a_column_replaced_by_a_mapped_one_is_kept_in_meta(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [records()[0] | {"answer": "wrong", "gold": "right"}])
    (found,) = load_pool(PoolConfig(str(path), columns=ColumnsConfig(answer="gold"))).trajectories
    assert found.answer == "right"
    assert dict(found.meta) == {"answer": "wrong"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_mapping_to_a_missing_column_is_refused_with_the_columns_found(tmp_path: Path, suffix: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", records())
    if suffix == ".parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(records()), path)
    with pytest.raises(PoolError) as caught:
        load_pool(PoolConfig(str(path), columns=ColumnsConfig(answer="gold")))
    assert "config.pool.columns.answer: there is no column 'gold'; found: problem_id, candidate_id" in str(caught.value)
    assert str(path) in str(caught.value)


def test_messages_and_texts_cannot_both_be_mapped() -> None:
    with pytest.raises(ConfigError, match=r"pool\.columns\.messages: expected either messages, or prompt and response"):
        ColumnsConfig(messages="m", prompt="p")


def test_records_without_a_teacher_can_be_given_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{k: v for k, v in records()[0].items() if k != "teacher"}])
    (found,) = load_pool(PoolConfig(str(path), teacher="ours")).trajectories
    assert found.teacher == "ours"


# --- filter and duplicates ---------------------------------------------------------------------------------------


def test_only_correct_leaves_out_wrong_records_and_lists_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [r | {"correct": i % 3 > 0} for i, r in enumerate(records())])
    pool = load_pool(PoolConfig(str(path), only_correct=True))
    assert [t.location for t in pool.trajectories] == [f"{path}:{i + 1}" for i in range(30) if i % 3 > 0]
    assert [r.location for r in pool.filtered] == [f"{path}:{i + 1}" for i in range(30) if i % 3 == 0]
    assert len(load_pool(PoolConfig(str(path))).trajectories) == 30


def test_under_the_filter_a_record_without_a_verdict_is_bad(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [records()[0] | {"correct": True}, records()[1]])
    with pytest.raises(PoolError, match=r"a\.jsonl:2: record .*: field correct: missing; config\.pool\.only_correct"):
        load_pool(PoolConfig(str(path), only_correct=True))
    pool = load_pool(PoolConfig(str(path), only_correct=True, on_bad_record="skip"))
    assert [record.location for record in pool.skipped] == [f"{path}:2"]


def test_a_filter_that_leaves_nothing_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [r | {"correct": False} for r in records()])
    with pytest.raises(PoolError, match=r"no valid record; the first of 30 left out: field correct: false"):
        load_pool(PoolConfig(str(path), only_correct=True))


def test_repeated_answers_are_reported_left_out_or_refused_as_configured(tmp_path: Path) -> None:
    items = [records()[0], records()[0] | {"candidate_id": "again"}, records()[1]]
    path = write_jsonl(tmp_path / "a.jsonl", items)
    kept = load_pool(PoolConfig(str(path)))
    assert len(kept.trajectories) == 3
    assert [(d.location, d.earlier) for d in kept.duplicates] == [(f"{path}:2", f"{path}:1")]
    skipped = load_pool(PoolConfig(str(path), duplicate_answers="skip"))
    assert [t.location for t in skipped.trajectories] == [f"{path}:1", f"{path}:3"]
    assert [(r.location, r.reason) for r in skipped.filtered] == [
        (f"{path}:2", f"the answer is word for word that of {path}:1")
    ]
    with pytest.raises(
        PoolError, match=r"a\.jsonl:2: record 0/again: the answer is word for word that of .*a\.jsonl:1"
    ):
        load_pool(PoolConfig(str(path), duplicate_answers="error", on_bad_record="skip"))


def test_the_same_answer_to_two_problems_is_not_a_repetition(tmp_path: Path) -> None:
    items = [r | {"messages": [*r["messages"][:2], {"role": "assistant", "content": "4"}]} for r in records()[:5]]
    assert load_pool(PoolConfig(str(write_jsonl(tmp_path / "a.jsonl", items)))).duplicates == ()


# --- splits and the hub ------------------------------------------------------------------------------------------


def test_a_folder_with_several_splits_asks_which(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train-00000.jsonl", records()[:20])
    write_jsonl(tmp_path / "data" / "test-00000.jsonl", records()[20:])
    with pytest.raises(PoolError, match=r"holds the splits test, train; set config\.pool\.split"):
        read_pool(tmp_path)
    pool = load_pool(PoolConfig(str(tmp_path), split="train"))
    assert len(pool.trajectories) == 20
    assert pool.files_left_out == ("data/test-00000.jsonl (another split)",)
    with pytest.raises(PoolError, match=r"no split 'dev'; config\.pool\.split may be test, train"):
        load_pool(PoolConfig(str(tmp_path), split="dev"))


def test_splits_saved_by_datasets_are_read_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": datasets.Dataset.from_list(records()), "extra": datasets.Dataset.from_list(records()[:2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(PoolError, match=r"set config\.pool\.split to one of train, extra"):
        read_pool(tmp_path / "saved")
    assert len(load_pool(PoolConfig(str(tmp_path / "saved"), split="extra")).trajectories) == 2


def test_only_a_name_without_a_local_path_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Umean").mkdir()
    assert not is_hub_id("Umean/RSR_data")  # a folder Umean is here: a typing error, not a download
    assert is_hub_id("Another/RSR_data")
    assert not any(map(is_hub_id, ["/data/pool", "a/b/c", "pool", "data/pool.jsonl", Path("Another/RSR_data")]))


def test_a_local_path_never_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError("reached the network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert len(read_pool(str(write_lists(tmp_path))).trajectories) == 30
    with pytest.raises(PoolError, match="no such file"):
        read_pool(str(tmp_path / "missing.jsonl"))


def test_a_hub_dataset_is_announced_fetched_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, asked = write_lists(tmp_path), []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"], options["local_files_only"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert len(read_pool("Another/RSR_data").trajectories) == 30
    assert asked == [("Another/RSR_data", "dataset", False)]
    assert "Another/RSR_data: *.jsonl, *.json, " in capfd.readouterr().err


def test_a_hub_dataset_that_is_not_cached_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PoolError, match=r"no-such-owner/nothing: no such file or folder.*HF_HUB_OFFLINE is set"):
        local_source("no-such-owner/nothing")


# --- memory ------------------------------------------------------------------------------------------------------


def test_texts_are_read_when_asked_for_and_candidates_share_their_prompt(tmp_path: Path) -> None:
    pool = read_pool(write_lists(tmp_path))
    half = pool.trajectories[10:20]
    assert [t.location for t in half[2:5]] == [t.location for t in list(pool.trajectories)[12:15]]
    assert pool.trajectories[-1].messages == list(pool.trajectories)[-1].messages
    assert pool.trajectories[0].prompt[0] is pool.trajectories[5].prompt[0]
    with pytest.raises(IndexError):
        pool.trajectories[30]
    by_ids = pool.by_ids()
    assert by_ids["3", "qwq.gen1"].response == answer("qwq", 1, 3)
    assert ("3", "unknown") not in by_ids
    assert [t.candidate_id for t in pool.by_problem()["4"]][:2] == ["deepseek-r1-0528.gen0", "deepseek-r1-0528.gen1"]


def test_texts_are_in_an_unnamed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    pool = read_pool(write_lists(tmp_path / "pool"))
    assert os.listdir(scratch) == []
    assert pool.trajectories[7].response == records()[7]["messages"][-1]["content"]


def test_a_deleted_pool_frees_its_file_at_once(tmp_path: Path) -> None:
    pool = read_pool(write_lists(tmp_path))
    assert pool.trajectories[0].response
    held = weakref.ref(pool.trajectories)
    gc.disable()
    try:
        del pool
        assert held() is None
    finally:
        gc.enable()


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """The measurement of scripts/bench_pool.py, on a pool of 30 million characters."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "bench_pool.py"
    arguments = [f"--folder={tmp_path / 'pool'}", "--problems=15", "--characters=60000"]
    output = subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output)
    assert found["records"] == 495
    assert found["characters"] > 20e6
    assert (found["peak_gib"] - found["peak_gib_before"]) * 2**30 < 0.5 * found["characters"]


def test_no_space_for_the_texts_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(PoolError, match=r"cannot store the pool's texts here: No space left on device; set TMPDIR"):
        read_pool(write_lists(tmp_path))
