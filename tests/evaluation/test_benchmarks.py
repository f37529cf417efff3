import fnmatch
import json
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmarks import BenchmarkSource, _snapshot, benchmark_source, read_benchmark

RECORDS = [{"problem": "1+1?", "answer": "2"}, {"problem": "½?", "answer": "0.5"}]


def write_json(path, records=RECORDS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Downloads "everything" from a folder; collects what was asked for."""
    asked = []

    def download(hub_id, **options):
        asked.append((hub_id, options["repo_type"]))
        assert "*.py" not in options["allow_patterns"]
        return str(tmp_path / "hub")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _snapshot.cache_clear()
    yield asked
    _snapshot.cache_clear()


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ("data/own.jsonl", BenchmarkSource("own", "data/own.jsonl", None, False)),
        ("few=data/math500.jsonl", BenchmarkSource("few", "data/math500.jsonl", None, False)),
        ("aime24=data/x.json", BenchmarkSource("aime24", "data/x.json", "train-*.parquet", False)),
        ("math500", BenchmarkSource("math500", "HuggingFaceH4/MATH-500", "test.jsonl", True)),
        ("twice=math500", BenchmarkSource("twice", "HuggingFaceH4/MATH-500", "test.jsonl", True)),
        ("own=some.one/set_2", BenchmarkSource("own", "some.one/set_2", None, True)),
        ("own=some-one/set:test/a.parquet", BenchmarkSource("own", "some-one/set", "test/a.parquet", True)),
        ("someone/set", BenchmarkSource("set", "someone/set", None, True)),
        (Path("math500"), BenchmarkSource("math500", "math500", "test.jsonl", False)),
        ("/no/such/folder/x", BenchmarkSource("x", "/no/such/folder/x", None, False)),
    ],
)
def test_entries_are_files_names_or_hub_ids(entry, source):
    assert benchmark_source(entry) == source


def test_an_existing_path_is_never_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("math500", "some/set"):
        write_json(tmp_path / path / "x.json")
    write_json(tmp_path / "odd=name.json")
    assert not any(benchmark_source(entry).on_hub for entry in ("math500", "some/set", "some/other", "a=some/set"))
    assert benchmark_source("odd=name.json").name == "odd=name"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv"])
def test_formats_hold_the_same_benchmark(tmp_path, suffix):
    expected = read_benchmark(f"own={write_json(tmp_path / 'a.json')}")
    path = tmp_path / f"other{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    elif suffix == ".csv":
        path.write_text("problem,answer\n1+1?,2\n½?,0.5\n", encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    else:
        write_json(path)
    assert read_benchmark(f"own={path}") == expected


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_empty_cells_of_a_table_are_missing_fields(tmp_path, suffix):
    path = tmp_path / f"own{suffix}"
    if suffix == ".csv":
        path.write_text("problem,answer,kind,level,id\na?,2,,,\nb?,C,letter,Level 4,x\n", encoding="utf-8")
    else:
        given = {"kind": "letter", "level": "Level 4", "id": "x"}
        rows = [{"problem": "a?", "answer": "2", **dict.fromkeys(given)}, {"problem": "b?", "answer": "C", **given}]
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = [(p.problem_id, p.answer, p.kind, p.level) for p in read_benchmark(path).problems]
    assert found == [("0", "2", "expression", None), ("x", "C", "letter", "4")]


def test_a_folder_means_its_only_data_file(tmp_path):
    write_json(tmp_path / "f" / "data" / "x.json")
    for name in ("dataset_info.json", ".hidden.json", "notes.txt"):
        write_json(tmp_path / "f" / name, {})
    assert [problem.answer for problem in read_benchmark(f"own={tmp_path / 'f'}").problems] == ["2", "0.5"]


def test_a_folder_with_several_data_files_is_refused_with_their_names(tmp_path):
    for name in ("a.json", "b.json"):
        write_json(tmp_path / "f" / name)
    with pytest.raises(EvaluationError, match=r"expected one data file, found: a\.json, b\.json; choose one"):
        read_benchmark(f"own={tmp_path / 'f'}")
    write_json(tmp_path / "empty" / "dataset_info.json")
    with pytest.raises(EvaluationError, match="found: none"):
        read_benchmark(f"own={tmp_path / 'empty'}")


def test_a_dataset_of_the_hub_is_downloaded_once_with_a_message(tmp_path, hub, capsys):
    write_json(tmp_path / "hub" / "test" / "a.json")
    write_json(tmp_path / "hub" / "b.json", RECORDS[:1])
    for _ in range(2):
        assert len(read_benchmark("own=someone/set:test/a.json").problems) == 2
    assert hub == [("someone/set", "dataset")]
    assert "from the Hugging Face hub" in capsys.readouterr().err


def _files_on_the_hub(folder, monkeypatch):
    """Downloads what is asked for, as the hub's client filters names; returns the downloaded names."""
    names = ["test.jsonl", "sub/test.jsonl", "train.jsonl", "test-0.parquet", "README.md"]
    downloaded = []

    def download(_, *, allow_patterns, **__):
        fitting = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)]
        downloaded.extend(fitting)
        for name in fitting:
            write_json(folder / name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return downloaded


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("own=someone/big:train.jsonl", ["train.jsonl"]),
        ("own=someone/big:sub/test.jsonl", ["sub/test.jsonl"]),
        ("own=someone/big:sub/*.jsonl", ["sub/test.jsonl"]),
        ("own=someone/big:test-*", ["test.jsonl", "sub/test.jsonl", "train.jsonl", "test-0.parquet"]),
    ],
)
def test_only_the_named_file_is_downloaded(tmp_path, monkeypatch, entry, expected):
    downloaded = _files_on_the_hub(tmp_path / "big", monkeypatch)
    assert benchmark_source(entry).local_file().is_file()
    assert downloaded == expected


@pytest.mark.usefixtures("hub")
def test_a_file_that_a_dataset_lacks_or_has_twice_is_refused(tmp_path, monkeypatch):
    _files_on_the_hub(tmp_path / "big", monkeypatch)
    with pytest.raises(EvaluationError, match=r"someone/big: expected one file nowhere\.csv, found: none"):
        benchmark_source("own=someone/big:nowhere.csv").local_file()
    with pytest.raises(EvaluationError, match=r"expected one file test\.jsonl, found: sub/test\.jsonl, test\.jsonl"):
        benchmark_source("own=someone/big:test.jsonl").local_file()


def test_without_network_the_message_suggests_a_local_file():
    _snapshot.cache_clear()
    with pytest.raises(EvaluationError, match="HF_HUB_OFFLINE is set and it is not in the cache; use a local file"):
        read_benchmark("own=no-such-owner/no-such-set")


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_damaged_tables_are_refused_in_one_line(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"PAR1\xff\x00 problem")
    with pytest.raises(EvaluationError, match=rf"x\{suffix}: cannot be read as {suffix[1:]}") as caught:
        read_benchmark(path)
    assert "\n" not in str(caught.value)
