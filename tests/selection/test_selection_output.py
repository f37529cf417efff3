import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.errors import SelectionError
from lark_jax.pool.records import Message, Pool, Trajectory
from lark_jax.selection import Choice, Selection, SelectionCounts, read_training_set, write_selection
from lark_jax.selection.output import TRAIN_SCHEMA

FILES = ["README.md", "dataset_info.json", "train.jsonl", "train.parquet"]
AWKWARD = 'tab\t "quotes" \\boxed{½}\r\nnext\u2028line \u0000 \x85 𝒙 trailing  \n'


def _selection(choices: list[Choice]) -> Selection:
    counts = SelectionCounts(1, len(choices), 0, (), (), 0, len(choices), 0)
    return Selection("lark", 3, tuple(choices), counts)


def _trajectory(candidate_id: str, response: str = "42", system: str | None = None) -> Trajectory:
    messages = [Message("user", "What is 6 times 7?"), Message("assistant", response)]
    if system is not None:
        messages.insert(0, Message("system", system))
    return Trajectory("p", candidate_id, "teacher", tuple(messages), "pool.jsonl:1", answer="42")


def _choice(candidate_id: str, weight: float = 1.0, rank: int = 1) -> Choice:
    return Choice("p", candidate_id, "teacher", weight, 0.1 * weight, rank)


contents = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(contents, st.floats(1e-12, 1.0)), min_size=1, max_size=4), st.none() | contents)
def test_training_set_reads_back_what_was_written(tmp_path_factory, answers, system):
    directory = tmp_path_factory.mktemp("selection")
    trajectories = tuple(_trajectory(f"c{k}", text, system) for k, (text, _) in enumerate(answers))
    choices = [_choice(f"c{k}", weight, rank=k + 1) for k, (_, weight) in enumerate(answers)]
    write_selection(_selection(choices), Pool(trajectories), directory)
    examples = read_training_set(directory)
    assert [example.trajectory.messages for example in examples] == [item.messages for item in trajectories]
    assert [example.trajectory.name for example in examples] == [item.name for item in trajectories]
    assert [example.weight for example in examples] == [weight for _, weight in answers]


def test_messages_are_those_of_the_pool_and_no_system_message_is_added(tmp_path):
    write_selection(_selection([_choice("c0")]), Pool((_trajectory("c0", AWKWARD),)), tmp_path)
    row = json.loads((tmp_path / "train.jsonl").read_bytes())
    assert list(row) == ["messages", "weight", "meta"]
    assert row["messages"] == [
        {"role": "user", "content": "What is 6 times 7?"},
        {"role": "assistant", "content": AWKWARD},
    ]
    assert row["meta"] == {"problem_id": "p", "candidate_id": "c0", "teacher": "teacher", "score": 0.1, "rank": 1}


def test_parquet_holds_the_same_rows_as_jsonl(tmp_path):
    rng = np.random.default_rng()
    weights = rng.dirichlet(np.ones(3))
    pool = Pool(tuple(_trajectory(f"c{k}", AWKWARD * k or "x", system="be brief") for k in range(3)))
    write_selection(_selection([_choice(f"c{k}", float(weights[k]), k + 1) for k in range(3)]), pool, tmp_path)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert pq.read_table(tmp_path / "train.parquet").to_pylist() == [json.loads(line) for line in lines]


def test_writing_twice_gives_the_same_bytes_and_no_other_file(tmp_path):
    pool = Pool((_trajectory("c0"), _trajectory("c1", AWKWARD)))
    selection = _selection([_choice("c1", 0.7), _choice("c0", 0.3, rank=2)])
    for name in ("first", "second"):
        write_selection(selection, pool, tmp_path / name)
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_choices_of_weight_zero_are_left_out_of_the_training_files(tmp_path):
    pool = Pool((_trajectory("c0"), _trajectory("c1")))
    write_selection(_selection([_choice("c0", 1.0), _choice("c1", 0.0, rank=2)]), pool, tmp_path)
    assert [example.trajectory.candidate_id for example in read_training_set(tmp_path)] == ["c0"]
    assert pq.read_table(tmp_path / "train.parquet").num_rows == 1


def test_a_chosen_candidate_missing_from_the_pool_is_refused_by_name(tmp_path):
    with pytest.raises(SelectionError, match=r"selection lark_B3: the pool has no candidate p/c9"):
        write_selection(_selection([_choice("c9")]), Pool((_trajectory("c0"),)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_dataset_info_describes_the_training_file_to_llama_factory(tmp_path):
    write_selection(_selection([_choice("c0")]), Pool((_trajectory("c0", system="be brief"),)), tmp_path)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert list(info) == ["lark_B3"]
    entry = info["lark_B3"]
    assert entry["formatting"] == "sharegpt"
    (row,) = [json.loads(line) for line in (tmp_path / entry["file_name"]).read_text().splitlines()]
    roles = [message[entry["tags"]["role_tag"]] for message in row[entry["columns"]["messages"]]]
    assert roles == [entry["tags"][f"{role}_tag"] for role in ("system", "user", "assistant")]
    assert entry["tags"]["content_tag"] == "content"


def test_the_resampled_file_repeats_rows_without_their_weights(tmp_path):
    pool = Pool(tuple(_trajectory(f"c{k}", AWKWARD * k or "x") for k in range(4)))
    choices = [_choice("c2", 0.6), _choice("c0", 0.3, 2), _choice("c3", 0.1, 3), _choice("c1", 0.0, 4)]
    write_selection(_selection(choices), pool, tmp_path, resampled=(2, 1, 0, 0))
    weighted, repeated = (_lines(tmp_path / name) for name in ("train.jsonl", "train_resampled.jsonl"))
    for row in weighted:
        del row["weight"]
    assert repeated == [weighted[0], weighted[0], weighted[1]]


def test_each_data_set_of_llama_factory_names_its_file(tmp_path):
    write_selection(_selection([_choice("c0")]), Pool((_trajectory("c0"),)), tmp_path, resampled=(3,))
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    files = {name: entry.pop("file_name") for name, entry in info.items()}
    assert files == {"lark_B3": "train.jsonl", "lark_B3_resampled": "train_resampled.jsonl"}
    assert info["lark_B3"] == info["lark_B3_resampled"]


@pytest.fixture
def datasets(tmp_path_factory, monkeypatch):
    module = pytest.importorskip("datasets", reason="the datasets library is not installed")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return module


@pytest.mark.parametrize("arguments", [{}, {"name": "weighted"}, {"data_files": "train.parquet"}], ids=str)
def test_the_datasets_library_loads_the_folder_byte_for_byte(tmp_path, datasets, arguments):
    pool = Pool((_trajectory("c0"), _trajectory("c1", AWKWARD, system="")))
    choices = [_choice("c1", 1.0), _choice("c0", 2.0, rank=2)]  # written "1.0": must not become integers
    write_selection(_selection(choices), pool, tmp_path, resampled=(2, 1))
    (tmp_path / "manifest.json").write_text('{"name": "select/lark_B3"}')
    loaded = datasets.load_dataset(str(tmp_path), split="train", **arguments)
    assert loaded.to_list() == _lines(tmp_path / "train.jsonl")
    assert loaded[0]["messages"][0] == {"role": "system", "content": ""}
    assert loaded[0]["messages"][-1] == {"role": "assistant", "content": AWKWARD}
    assert loaded.features == datasets.Features.from_arrow_schema(TRAIN_SCHEMA)


def test_the_datasets_library_loads_the_resampled_rows_by_name(tmp_path, datasets):
    pool = Pool((_trajectory("c0"), _trajectory("c1", AWKWARD)))
    write_selection(_selection([_choice("c1"), _choice("c0", rank=2)]), pool, tmp_path, resampled=(2, 1))
    loaded = datasets.load_dataset(str(tmp_path), "resampled", split="train")
    assert loaded.to_list() == _lines(tmp_path / "train_resampled.jsonl")
    assert set(loaded.features) == {"messages", "meta"}


def _lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


VALID_ROW = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "weight": 0.5,
    "meta": {"problem_id": "p", "candidate_id": "c", "teacher": "t", "score": 0.1, "rank": 1},
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON document"),
        ("[1]", "field 'weight': expected float, got"),
        (json.dumps(VALID_ROW | {"weight": "heavy"}), "field 'weight': expected float, got 'heavy'"),
        (json.dumps(VALID_ROW | {"weight": float("nan")}), "field 'weight' is nan, expected a positive number"),
        (json.dumps(VALID_ROW | {"weight": -0.5}), "field 'weight' is -0.5, expected a positive number"),
        (json.dumps(VALID_ROW | {"meta": {"problem_id": 7}}), "field 'problem_id': expected str, got 7"),
        (json.dumps(VALID_ROW | {"messages": []}), "field 'messages' does not end with an assistant turn"),
        (json.dumps(VALID_ROW | {"messages": [{"role": "tool", "content": "x"}]}), "field 'role' is 'tool'"),
        (json.dumps(VALID_ROW | {"messages": [{"role": "user"}]}), "field 'content': expected str, got None"),
    ],
)
def test_a_broken_training_file_is_refused_in_one_line_with_file_line_and_field(tmp_path, line, message):
    (tmp_path / "train.jsonl").write_text(json.dumps(VALID_ROW) + "\n" + line + "\n")
    with pytest.raises(SelectionError) as caught:
        read_training_set(tmp_path)
    assert f"{tmp_path / 'train.jsonl'}:2: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_training_file_is_refused_by_name(tmp_path):
    with pytest.raises(SelectionError, match=r"train\.jsonl: no such training file"):
        read_training_set(tmp_path)
