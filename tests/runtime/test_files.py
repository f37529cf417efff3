"""A final name never holds half a file; equal values have equal hashes."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.errors import PipelineError, PoolError
from lark_jax.runtime.files import (
    ContentHashes,
    atomic_directory,
    atomic_path,
    exclusive,
    read_json,
    remove_directory,
    remove_partial_files,
    sha256_of_bytes,
    sha256_of_json,
    sha256_of_path,
    write_json,
    write_jsonl,
    write_text,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.dictionaries(st.text(), inner) | st.lists(inner),
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_atomic_path_makes_folders_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["file.txt"]


def test_a_failing_block_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_jsonl_of_a_failing_generator_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    write_jsonl(target, [{"row": 0}])
    with pytest.raises(ZeroDivisionError):
        write_jsonl(target, ({"row": 1 // (2 - i)} for i in range(4)))
    assert target.read_text() == '{"row": 0}\n'
    assert names(tmp_path) == ["rows.jsonl"]


def test_a_killed_process_leaves_the_old_file_and_its_leftovers_can_be_removed(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    program = (
        "import os, sys; from lark_jax.runtime.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('ha'); os.kill(os.getpid(), 9)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(target)], check=False, cwd=Path(__file__).resolve().parents[2]
    )
    assert finished.returncode == -9
    assert target.read_text() == "old"
    assert len(names(tmp_path)) == 2
    remove_partial_files(tmp_path)
    assert names(tmp_path) == ["file.txt"]


def test_remove_partial_files_spares_everything_else(tmp_path: Path) -> None:
    for name in (".hidden", "data.partial-1", "plain"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".folder.partial-77" / "inner").mkdir(parents=True)
    remove_partial_files(tmp_path)
    assert names(tmp_path) == [".hidden", "data.partial-1", "plain"]


def test_atomic_directory_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for round_name in ("first", "second"):
        with atomic_directory(target) as temporary:
            (temporary / "nested").mkdir()
            (temporary / "nested" / round_name).write_text(round_name)
    assert names(target / "nested") == ["second"]
    assert names(tmp_path) == ["out"]


def test_a_failing_block_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as temporary:
        (temporary / "kept").write_text("1")

    def fail() -> None:
        with atomic_directory(target) as temporary:
            (temporary / "new").write_text("2")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert names(target) == ["kept"]
    assert names(tmp_path) == ["out"]


@given(JSON)
def test_json_is_read_back_as_written(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@given(st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xD8FF, exclude_categories=()), min_size=1), st.text())
def test_half_a_surrogate_pair_is_read_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, halves: str, text: str
) -> None:
    """A server's JSON may have one, which UTF-8 cannot represent; other lines are written in UTF-8 as usual."""
    folder = tmp_path_factory.mktemp("json")
    write_jsonl(folder / "rows.jsonl", [{"text": text}, {"text": halves, text: halves}])
    first, second = folder.joinpath("rows.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert first == json.dumps({"text": text}, ensure_ascii=False)
    assert json.loads(second) == {"text": halves, text: halves}
    write_json(folder / "value.json", {text: [halves]})
    assert read_json(folder / "value.json") == {text: [halves]}


@given(st.dictionaries(st.text(), JSON, min_size=2))
def test_json_hash_and_bytes_do_not_depend_on_key_order(value: dict) -> None:
    shuffled = random.sample(list(value.items()), len(value))
    assert sha256_of_json(dict(shuffled)) == sha256_of_json(value)


def test_json_hash_depends_on_values_and_list_order() -> None:
    values = [{"a": [1, 2]}, {"a": [2, 1]}, {"a": [1, 2], "b": None}, {"a": ["1", 2]}, [], {}]
    assert len({sha256_of_json(value) for value in values}) == len(values)


def test_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)  # more than one block
    (tmp_path / "file").write_bytes(data)
    assert sha256_of_path(tmp_path / "file") == sha256_of_bytes(data)


def test_hash_of_a_folder_depends_on_names_and_bytes_but_not_on_order_or_hidden_files(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            write_text(tmp_path / name / file, text)
        return sha256_of_path(tmp_path / name)

    same = folder("one", {"a": "1", "sub/b": "2"})
    assert folder("two", {"sub/b": "2", "a": "1", ".cache/x": "9", ".hidden": "9"}) == same
    assert folder("three", {"a": "1", "sub/c": "2"}) != same
    assert folder("four", {"a": "1", "sub/b": "3"}) != same
    assert folder("five", {"a": "1"}) != same


def test_hash_of_some_files_of_a_folder_is_that_of_a_folder_with_only_these(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_text(tmp_path / name / "sub" / "a", "1")
    write_text(tmp_path / "one" / "README", "not among the files")
    among, expected = [tmp_path / "one" / "sub" / "a"], sha256_of_path(tmp_path / "two")
    assert sha256_of_path(tmp_path / "one", among) == expected
    hashes = ContentHashes(tmp_path / "cache.json")
    assert hashes.of(tmp_path / "one", among=among) == expected
    assert hashes.of(tmp_path / "one") == sha256_of_path(tmp_path / "one") != expected


def test_content_hashes_notice_a_change_and_survive_a_broken_cache(tmp_path: Path) -> None:
    cache, file = tmp_path / "cache.json", tmp_path / "data"
    file.write_text("one")
    assert ContentHashes(cache).of(file) == sha256_of_bytes(b"one")
    assert ContentHashes(cache).of(file) == sha256_of_bytes(b"one")
    file.write_text("three")
    assert ContentHashes(cache).of(file) == sha256_of_bytes(b"three")
    cache.write_text("{ broken")
    assert ContentHashes(cache).of(file) == sha256_of_bytes(b"three")
    json.loads(cache.read_text())


def test_content_hashes_read_an_unchanged_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data"
    file.write_text("one")
    expected = ContentHashes(tmp_path / "cache.json").of(file)

    def refuse(_: Path) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr("lark_jax.runtime.files.sha256_of_path", refuse)
    assert ContentHashes(tmp_path / "cache.json").of(file) == expected


def test_a_missing_path_raises_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"pool\.jsonl: no such file or folder"):
        ContentHashes(tmp_path / "cache.json").of(tmp_path / "pool.jsonl", missing=PoolError)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(PipelineError, match=rf"{tmp_path}/lock: cannot be locked \({os.strerror(number)}\).*another"),
        exclusive(tmp_path / "lock", "config.workdir"),
    ):
        pytest.fail("nothing keeps a second run out")


def test_a_half_deleted_folder_is_removed_by_the_next_call(tmp_path: Path) -> None:
    for name in (".old.partial-1", ".old.partial-23", "old", ".older.partial-1"):
        (tmp_path / name / "inside").mkdir(parents=True)
    remove_directory(tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == [".older.partial-1"]
