"""Broken files and folders of pools are refused with file and line, or bad records skipped and listed if so configured.

Bad records and lines as such, in JSON lines and parquet: test_readers.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lark_jax.errors import PoolError
from lark_jax.pool import read_pool
from lark_jax.pool.json_records import json_list_records

PROBLEMS, TEACHERS = 4, ("a", "b")
BIG = 10 * 1024 * 1024


@dataclass
class Broken:
    """A pool that a case has broken. `skipped`: locations of the records that "skip" lists; None: refused anyway."""

    source: Path
    words: tuple[str, ...]  # of the error
    skipped: tuple[str, ...] | None


def item(problem: int, teacher: str = "a", **changes: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"What is {problem} + 1?"}, {"role": "assistant", "content": f"{teacher}!"}]
    return {"messages": turns, **changes}


def record(problem: int, candidate: Any = "a.1", **changes: Any) -> dict[str, Any]:
    return {"problem_id": problem, "candidate_id": candidate, "teacher": "a", **item(problem), **changes}


def lists(folder: Path) -> Path:
    for teacher in TEACHERS:
        for rollout in ("1", "2"):
            items = [item(number, f"{teacher}{rollout}") for number in range(PROBLEMS)]
            edit_list(folder / "pool" / teacher / f"{rollout}.json", lambda _, items=items: items)
    return folder / "pool"


def edit_list(path: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    """Writes the list as `change` returns it, one item per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    items = change(json.loads(path.read_text()) if path.exists() else [])
    path.write_text("[" + ",\n".join(json.dumps(value) for value in items) + "]", encoding="utf-8")


def jsonl(folder: Path, *lines: Any) -> Path:
    """Three good records with `lines` after the first; bytes are written unchanged."""
    path = folder / "pool.jsonl"
    every = [record(0), *lines, record(1), record(2)]
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in every))
    return path


CASES: dict[str, Callable[[Path], Broken]] = {}


def case(function: Callable[[Path], Broken]) -> Callable[[Path], Broken]:
    CASES[function.__name__] = function
    return function


def bad_item(folder: Path, change: Callable[[Any], Any], *words: str) -> Broken:
    """A pool of lists in one of which item 2 is bad."""
    pool = lists(folder)
    path = pool / "b" / "1.json"
    edit_list(path, lambda items: [*items[:2], change(items[2]), *items[3:]])
    return Broken(pool, (f"{path}:3: item 2: ", *words), (f"{path}:3: item 2",))


# Encodings and damage


@case
def list_in_utf16_without_a_mark(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "a" / "1.json"
    path.write_text(path.read_text(), encoding="utf-16-le")
    return Broken(pool, (f"{path}: is UTF-16; save it as UTF-8",), None)


@case
def list_in_utf32(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "a" / "1.json"
    path.write_text(path.read_text(), encoding="utf-32")
    return Broken(pool, (f"{path}: is UTF-32; save it as UTF-8",), None)


@case
def list_cut_off(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "a" / "2.json"
    path.write_bytes(path.read_bytes()[:-20])
    return Broken(pool, (f"{path}:4: item 3: ", "the file ends in the middle of the list"), (f"{path}:4: item 3",))


@case
def list_with_a_quote_missing(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "a" / "2.json"
    path.write_text(path.read_text().replace('"What is 3', "What is 3"))
    return Broken(pool, (f"{path}:4: item 3: is not valid JSON",), (f"{path}:4: item 3",))


@case
def list_with_a_comma_at_its_end(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "a" / "1.json"
    path.write_text(path.read_text()[:-1] + ",\n]")
    return Broken(
        pool, (f"{path}:5: item 4: is not valid JSON: there is a comma without an item",), (f"{path}:5: item 4",)
    )


@case
def list_that_continues_after_its_end(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "a" / "1.json"
    path.write_text(path.read_text() + "\n[]")
    return Broken(pool, (f"{path}:5: there is more after the end of the list",), None)


@case
def list_closed_by_a_brace(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "a" / "1.json"
    path.write_text(path.read_text()[:-1] + ",\n}]")
    return Broken(pool, (f"{path}:5: item 4: is not valid JSON",), (f"{path}:5: item 4",))


@case
def lines_in_a_file_that_is_called_a_list(folder: Path) -> Broken:
    path = jsonl(folder).rename(folder / "pool.json")
    return Broken(path, (f"{path}: expected a JSON list of records", "is called .jsonl"), None)


@case
def arrow_cut_off(folder: Path) -> Broken:
    path = folder / "pool.arrow"
    table = pa.Table.from_pylist([record(number) for number in range(100)])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(path.read_bytes()[:2000])
    return Broken(path, (f"{path}: is not a complete Arrow file",), None)


@case
def arrow_cut_between_two_batches(folder: Path) -> Broken:
    """Arrow itself reads this as a shorter file."""
    path = folder / "pool.arrow"
    table = pa.Table.from_pylist([record(number) for number in range(100)])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
        end = sink.tell()
    path.write_bytes(path.read_bytes()[:end])
    return Broken(path, (f"{path}: is not a complete Arrow file: the mark at its end is missing",), None)


@case
def nan_in_an_item(folder: Path) -> Broken:
    return bad_item(folder, lambda value: value | {"reward": float("nan")}, "NaN is not a JSON number, use null")


@case
def deep_nesting_in_an_item(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "b" / "1.json"
    path.write_text(path.read_text().replace("b1!", "@", 1).replace('"@"', "[" * 100_000 + "]" * 100_000))
    return Broken(pool, (f"{path}:1: item 0: is not valid JSON",), (f"{path}:1: item 0",))


# Records


@case
def sharegpt_observation(folder: Path) -> Broken:
    turns = [{"from": "human", "value": "x"}, {"from": "observation", "value": "3"}, {"from": "gpt", "value": "y"}]
    return bad_item(folder, lambda _: {"conversations": turns}, "field messages[1].role: unknown role 'observation'")


@case
def sharegpt_without_values(folder: Path) -> Broken:
    turns = [{"from": "human", "value": "x"}, {"from": "gpt"}]
    return bad_item(folder, lambda _: {"conversations": turns}, "field messages[1].content: missing")


@case
def two_system_prompts(folder: Path) -> Broken:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    changed = {"conversations": turns, "system": "t"}
    return bad_item(folder, lambda _: changed, "record 2/b.1: field system: the conversation has a system turn")


@case
def response_without_a_prompt(folder: Path) -> Broken:
    return bad_item(folder, lambda _: {"response": "4", "prompt": None}, "field messages: missing")


@case
def prompt_that_is_a_number(folder: Path) -> Broken:
    return bad_item(folder, lambda _: {"response": "4", "prompt": 4}, "field prompt: missing or not a text")


@case
def item_that_is_null(folder: Path) -> Broken:
    return bad_item(folder, lambda _: None, "expected an object with fields, got null")


@case
def lists_in_another_order(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "b" / "2.json"
    edit_list(path, lambda items: items[::-1])
    words = (f"{path}:1: item 0: record 0/b.2: field messages: the prompt differs", f"{pool}/a/1.json:1: item 0")
    return Broken(pool, words, tuple(f"{path}:{number + 1}: item {number}" for number in range(PROBLEMS)))


# Files and folders


@case
def list_with_fewer_problems(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "b" / "2.json"
    edit_list(path, lambda items: items[:3])
    return Broken(pool, (f"{path}: record b.2: has 3 items, {pool}/a/1.json has 4",), (str(path),))


@case
def list_without_items(folder: Path) -> Broken:
    pool = lists(folder)
    path = pool / "b" / "2.json"
    path.write_text(" [ ]\n")
    return Broken(pool, (f"{path}: record b.2: has 0 items, {pool}/a/1.json has 4",), (str(path),))


@case
def teacher_file_missing(folder: Path) -> Broken:
    pool = lists(folder)
    (pool / "b" / "2.json").unlink()
    return Broken(pool, (f"{pool}/b: teacher b has 1 files, a has 2; add the missing ones",), (f"{pool}/b",))


@case
def empty_file(folder: Path) -> Broken:
    pool = lists(folder)
    (pool / "b" / "2.json").write_bytes(b"")
    return Broken(pool, (f"{pool}/b/2.json: expected a JSON list of records, found ''",), None)


@case
def folder_of_other_files(folder: Path) -> Broken:
    (folder / "pool").mkdir()
    (folder / "pool" / "data.csv").write_text("a,b")
    return Broken(folder / "pool", ("no pool in this folder", "it holds data.csv (not a pool file)"), None)


@case
def folder_of_two_kinds(folder: Path) -> Broken:
    pool = lists(folder)
    (pool / "more.jsonl").write_text("")
    return Broken(pool, (f"{pool}: holds .json and .jsonl files", "config.pool.exclude"), None)


@case
def loop_of_links_between_folders(folder: Path) -> Broken:
    pool = lists(folder)
    (pool / "c").symlink_to(pool, target_is_directory=True)
    return Broken(pool, (f"{pool}/c: is a link to a folder",), None)


@case
def link_to_itself(folder: Path) -> Broken:
    pool = lists(folder)
    (pool / "b" / "3.json").symlink_to(pool / "b" / "3.json")
    return Broken(pool, (f"{pool}/b/3.json: is a broken link",), None)


@case
def saved_dataset_without_one_of_its_files(folder: Path) -> Broken:
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    return Broken(folder, (f"{folder}/data-0.arrow: missing, though state.json names it",), None)


@case
def saved_dataset_with_a_damaged_note(folder: Path) -> Broken:
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{")
    return Broken(folder, (f"{folder}/state.json: not as written by the library datasets",), None)


@pytest.mark.parametrize("name", CASES)
def test_a_broken_pool_is_refused_with_its_location_or_its_bad_records_are_skipped(name: str, tmp_path: Path) -> None:
    broken = CASES[name](tmp_path)
    with pytest.raises(PoolError) as caught:
        read_pool(broken.source)
    message = str(caught.value)
    assert "\n" not in message
    for word in broken.words:
        assert word in message
    if broken.skipped is None:
        with pytest.raises(PoolError):
            read_pool(broken.source, on_bad_record="skip")
        return
    pool = read_pool(broken.source, on_bad_record="skip")
    assert tuple(skipped.location for skipped in pool.skipped) == broken.skipped
    assert all(skipped.reason for skipped in pool.skipped)
    names = {trajectory.name for trajectory in pool.trajectories}
    assert len(names) == len(pool.trajectories) > 0


def test_a_line_and_an_item_of_ten_megabytes_are_read_whole(tmp_path: Path) -> None:
    text = "x\\" * (BIG // 2)
    line = record(3, messages=[*item(3)["messages"][:1], {"role": "assistant", "content": text}])
    assert read_pool(jsonl(tmp_path, line)).trajectories[1].response == text
    (tmp_path / "one.json").write_text(json.dumps([record(0), line, record(1)]))
    assert read_pool(tmp_path / "one.json").trajectories[1].response == text


def test_a_line_beyond_the_limit_is_one_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lark_jax.pool.json_records.MOST_RECORD_BYTES", 1000)
    path = jsonl(tmp_path, record(3, answer="x" * 5000))
    with pytest.raises(PoolError, match=r"pool\.jsonl:2: the line has more than"):
        read_pool(path)
    pool = read_pool(path, on_bad_record="skip")
    assert [t.location for t in pool.trajectories] == [f"{path}:{line}" for line in (1, 3, 4)]
    assert [s.location for s in pool.skipped] == [f"{path}:2"]


def test_a_list_whose_item_has_no_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lark_jax.pool.json_records.MOST_RECORD_BYTES", 1000)
    monkeypatch.setattr("lark_jax.pool.json_records._FIRST_READ", 100)
    path = tmp_path / "one.json"
    path.write_text("[" + json.dumps(record(0)) + ',\n{"a": "' + "x" * 1_000_000)
    read: list[int] = []
    *_, last = json_list_records(path, read.append)
    assert last.location == f"{path}:2: item 1"
    assert "a quote may be missing" in str(last.record)
    assert sum(read) < 10_000
