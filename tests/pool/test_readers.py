"""Good pools come out as they went in; every kind of bad one ends in one line that names place and remedy."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.errors import ConfigError, PoolError
from lark_jax.pool import Pool, read_pool
from lark_jax.pool.schema import parse_record

PROMPT = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 2 + 2?"}]


def record(problem_id="p1", candidate_id="c1", *, response="It is 4.", prompt=PROMPT, **fields):
    messages = [*prompt, {"role": "assistant", "content": response}]
    return {"problem_id": problem_id, "candidate_id": candidate_id, "teacher": "t", "messages": messages, **fields}


def without(field):
    return {name: value for name, value in record().items() if name != field}


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records), encoding="utf-8")
    return path


def write_parquet(path: Path, records) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


@pytest.fixture
def jsonl(tmp_path):
    return lambda *records: write_jsonl(tmp_path / "pool.jsonl", records)


def one_line_error(source, **kwargs) -> str:
    with pytest.raises(PoolError) as caught:
        read_pool(source, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is accepted --------------------------------------------------------------------------------------------


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@given(st.lists(TEXT, min_size=1, max_size=5), TEXT)
def test_message_text_survives_both_formats_byte_for_byte(tmp_path_factory, responses, question):
    prompt = [{"role": "user", "content": question}]
    records = [record("p", index, response=text, prompt=prompt) for index, text in enumerate(responses)]
    folder = tmp_path_factory.mktemp("pool")
    for path in (write_jsonl(folder / "a.jsonl", records), write_parquet(folder / "a.parquet", records)):
        pool = read_pool(path)
        assert [item.response for item in pool.trajectories] == responses
        assert {item.prompt[0].content for item in pool.trajectories} == {question}
        assert pool.skipped == ()


def test_fields_are_kept_and_unknown_ones_go_into_meta(jsonl):
    given_record = record(7, 0, answer="4", correct=True, meta={"seed": 3}, source_id="x", gold=None)
    (item,) = read_pool(jsonl(given_record)).trajectories
    assert (item.problem_id, item.candidate_id, item.teacher) == ("7", "0", "t")
    assert (item.answer, item.correct) == ("4", True)
    assert dict(item.meta) == {"seed": 3, "source_id": "x", "gold": None}


def test_locations_count_lines_and_rows_from_one(tmp_path):
    records = [record(candidate_id=index) for index in range(3)]
    jsonl_pool = read_pool(write_jsonl(tmp_path / "a.jsonl", records))
    parquet_pool = read_pool(write_parquet(tmp_path / "a.parquet", records))
    assert [item.location for item in jsonl_pool.trajectories] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 2, 3)]
    assert [item.location for item in parquet_pool.trajectories] == [f"{tmp_path}/a.parquet:row {n}" for n in (1, 2, 3)]


def test_both_formats_give_the_same_trajectories(tmp_path):
    records = [record(1, index, correct=index % 2 == 0, answer="4", gold=str(index)) for index in range(600)]
    pools = [
        read_pool(write_jsonl(tmp_path / "a.jsonl", records)),
        read_pool(write_parquet(tmp_path / "a.parquet", records)),
    ]

    def content(pool: Pool):
        return [(t.name, t.teacher, t.messages, t.answer, t.correct, dict(t.meta)) for t in pool.trajectories]

    assert content(pools[0]) == content(pools[1])
    assert len(pools[0].trajectories) == 600


def test_parquet_accepts_categories_large_text_and_null_message_fields(tmp_path):
    messages = [{**message, "tool_calls": None} for message in record()["messages"]]
    table = pa.table(
        {
            "problem_id": pa.array(["p", "p"]).dictionary_encode(),
            "candidate_id": pa.array([1, 2], pa.uint16()),
            "teacher": pa.array(["t", "t"], pa.large_string()),
            "messages": pa.array([messages, messages]),
            "answer": pa.nulls(2),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert [item.name for item in read_pool(tmp_path / "a.parquet").trajectories] == ["p/1", "p/2"]


def test_byte_order_mark_line_ends_and_blank_lines_do_no_harm(tmp_path):
    lines = [json.dumps(record(candidate_id=index)).encode() for index in (1, 2)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n" + lines[1])
    pool = read_pool(tmp_path / "a.jsonl")
    assert [(item.candidate_id, item.location.rpartition(":")[2]) for item in pool.trajectories] == [
        ("1", "1"),
        ("2", "3"),
    ]


def test_unicode_line_separators_do_not_end_a_record(jsonl):
    (item,) = read_pool(jsonl(record(response="a\u2028b\u0085c"))).trajectories
    assert item.response == "a\u2028b\u0085c"


def test_a_prompt_may_hold_earlier_assistant_turns(jsonl):
    prompt = [*PROMPT, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]
    (item,) = read_pool(jsonl(record(prompt=prompt))).trajectories
    assert [message.role for message in item.prompt] == ["system", "user", "assistant", "user"]


def test_candidates_of_one_problem_share_one_prompt_in_memory(jsonl):
    first, second = read_pool(jsonl(record(candidate_id=1), record(candidate_id=2))).trajectories
    assert first.prompt[1] is second.prompt[1]


def test_integer_and_text_ids_of_different_problems_are_compared_as_text(jsonl):
    pool = read_pool(jsonl(record(1, 1), record("1", 2), record("01", 1)))
    assert {name: len(group) for name, group in pool.by_problem().items()} == {"1": 2, "01": 1}


# --- bad records -------------------------------------------------------------------------------------------------


def with_messages(*messages):
    return {**record(), "messages": list(messages)}


USER, ASSISTANT = PROMPT[1], {"role": "assistant", "content": "4"}
BAD_RECORDS = {
    "a list": ([1, 2], "expected an object with fields, got a list"),
    "no problem_id": (without("problem_id"), "field problem_id: missing"),
    "no candidate_id": (without("candidate_id"), "record p1: field candidate_id: missing"),
    "no teacher": (without("teacher"), "field teacher: missing"),
    "no messages": (without("messages"), "field messages: missing"),
    "null messages": ({**record(), "messages": None}, "field messages: missing"),
    "boolean id": (record(True), "field problem_id: expected text or an integer, got boolean true"),
    "float id": (record("p1", 1.0), "field candidate_id: expected text or an integer, got number 1.0"),
    "blank id": (record(" "), "field problem_id: ' ' is empty"),
    "line break in id": (record("a\nb"), r"field problem_id: 'a\nb' is empty or has unprintable"),
    "teacher is a number": (record() | {"teacher": 3}, "field teacher: expected text, got number 3"),
    "blank teacher": (record() | {"teacher": ""}, "field teacher: '' is empty"),
    "messages is text": (record() | {"messages": "hi"}, "field messages: expected a list"),
    "no turns": (with_messages(), "field messages: the list is empty"),
    "turn is text": (with_messages("hi", ASSISTANT), "field messages[0]: expected an object"),
    "unknown role": (
        with_messages({"role": "tool", "content": "x"}, ASSISTANT),
        "messages[0].role: unknown role 'tool'",
    ),
    "no role": (with_messages({"content": "x"}, ASSISTANT), "field messages[0].role: missing"),
    "no content": (with_messages({"role": "user"}, ASSISTANT), "field messages[0].content: missing"),
    "content is a list": (
        with_messages({"role": "user", "content": [{"type": "text", "text": "x"}]}, ASSISTANT),
        "field messages[0].content: expected text, got a list",
    ),
    "empty content": (with_messages({"role": "user", "content": ""}, ASSISTANT), "field messages[0].content: empty"),
    "blank answer": (record(response=" \n"), "field messages[2].content: empty"),
    "reasoning next to content": (
        with_messages(USER, ASSISTANT | {"reasoning_content": "2 + 2"}),
        "field messages[1].reasoning_content: unknown",
    ),
    "tool calls": (with_messages(USER, ASSISTANT | {"tool_calls": []}), "field messages[1].tool_calls: unknown"),
    "ends with user": (with_messages(USER, ASSISTANT, USER), "the last turn is 'user'"),
    "two answers": (with_messages(USER, ASSISTANT, ASSISTANT), "two assistant turns at the end"),
    "no prompt": (with_messages(ASSISTANT), "there is no prompt"),
    "NUL": (record(response="a\0b"), "field messages[2].content: has a NUL character at position 1"),
    "answer is a number": (record(answer=4), "field answer: expected text, got number 4"),
    "correct is a number": (record(correct=1), "field correct: expected true, false or nothing, got number 1"),
    "meta is a list": (record(meta=[1]), "field meta: expected an object, got a list"),
    "column and meta": (record(meta={"gold": "4"}, gold="5"), "field gold: is a column and a key of meta too"),
}


@pytest.mark.parametrize(("bad", "expected"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_bad_record_is_named_in_one_line_or_skipped_with_that_reason(jsonl, bad, expected):
    path = jsonl(record("other"), bad, record("last"))
    message = one_line_error(path)
    assert message.startswith(f"{path}:2: ")
    assert expected in message
    assert 'pool.on_bad_record="skip"' in message

    pool = read_pool(path, on_bad_record="skip")
    assert [item.problem_id for item in pool.trajectories] == ["other", "last"]
    (skipped,) = pool.skipped
    assert skipped.location == f"{path}:2"
    assert skipped.reason in message


def test_a_bad_record_is_named_by_its_ids(jsonl):
    path = jsonl(record(3, 14, correct="yes"))
    assert one_line_error(path).startswith(f"{path}:1: record 3/14: field correct: ")


BAD_LINES = {
    "cut off": (json.dumps(record()).encode()[:60], "the line may be cut off"),
    "not JSON": (b"problem_id,candidate_id", "is not valid JSON"),
    "not UTF-8": (json.dumps(record(response="caf@")).encode().replace(b"@", b"\xe9"), "is not UTF-8 at byte"),
    "NaN": (json.dumps(record(gold=float("nan"))).encode(), "NaN is not a JSON number"),
    "infinity by overflow": (json.dumps(record(gold="@")).encode().replace(b'"@"', b"1e999"), "field gold: inf is not"),
    "half a surrogate pair": (
        json.dumps(record(response="@")).encode().replace(b"@", b"\\ud83d"),
        "field messages[2].content: has half of a surrogate pair at position 0",
    ),
    "half a pair in meta": (
        json.dumps(record(gold="@")).encode().replace(b"@", b"\\ud83d"),
        "field gold: has half of a surrogate pair",
    ),
    "field twice": (b'{"teacher": "a", "teacher": "b"}', "field 'teacher' is given twice"),
    "too deep": (b"[" * 100_000, "is not valid JSON"),
    "huge number": (b'{"problem_id": ' + b"9" * 5000 + b"}", "is not valid JSON"),
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_in_one_line_or_skipped(tmp_path, line, expected):
    path = tmp_path / "pool.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(record()).encode() + b"\n")
    message = one_line_error(path)
    assert message.startswith(f"{path}:1: ")
    assert expected in message
    pool = read_pool(path, on_bad_record="skip")
    assert len(pool.trajectories) == len(pool.skipped) == 1


def test_the_later_of_two_records_with_the_same_ids_is_bad(jsonl):
    path = jsonl(record(1, 1, response="first"), record(1, 2), record("1", "1", response="second"))
    message = one_line_error(path)
    assert message.startswith(f"{path}:3: record 1/1: ")
    assert f"these ids are taken by {path}:1" in message
    pool = read_pool(path, on_bad_record="skip")
    assert [item.response for item in pool.trajectories] == ["first", "It is 4."]
    assert [(item.problem_id, item.candidate_id) for item in pool.skipped] == [("1", "1")]


@pytest.mark.parametrize("other", [PROMPT[1:], [PROMPT[0], {"role": "user", "content": "What is 2 + 2? "}]])
def test_candidates_of_one_problem_with_another_prompt_are_bad(jsonl, other):
    path = jsonl(record(candidate_id=1), record(candidate_id=2, prompt=other), record(candidate_id=3))
    message = one_line_error(path)
    assert message.startswith(f"{path}:2: record p1/2: ")
    assert f"differs from that of the same problem at {path}:1" in message
    pool = read_pool(path, on_bad_record="skip")
    assert [item.candidate_id for item in pool.trajectories] == ["1", "3"]


def test_a_skipped_record_does_not_reserve_its_ids_or_prompt(jsonl):
    broken = record(1, 1, prompt=PROMPT[1:], correct="no")
    pool = read_pool(jsonl(broken, record(1, 1), record(1, 2)), on_bad_record="skip")
    assert [item.name for item in pool.trajectories] == ["1/1", "1/2"]


def test_a_record_need_not_be_a_dictionary_of_json():
    with pytest.raises(PoolError, match=r"here: record p1/c1: field when: cannot be kept as JSON \(a set\)"):
        parse_record(record(when={1}), "here")


# --- bad files ---------------------------------------------------------------------------------------------------


def test_a_pool_without_records_is_refused_also_when_skipping(tmp_path, jsonl):
    (tmp_path / "empty.jsonl").write_text("\n")
    for policy in ("error", "skip"):
        assert "no valid record" in one_line_error(tmp_path / "empty.jsonl", on_bad_record=policy)
    message = one_line_error(jsonl(record(correct=1), without("teacher")), on_bad_record="skip")
    assert "the first of 2 bad ones: field correct" in message


@pytest.mark.parametrize("name", ["pool.csv", "pool.jsonl.gz", "pool"])
def test_other_kinds_of_file_are_refused_with_the_supported_ones(tmp_path, name):
    (tmp_path / name).write_text("x")
    assert "a .jsonl, .json, .parquet or .arrow file" in one_line_error(tmp_path / name)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path):
    assert "no such file" in one_line_error(tmp_path / "missing.jsonl")
    message = one_line_error(tmp_path)
    assert "no pool in this folder" in message
    assert "it is empty" in message


def test_utf16_is_refused_as_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record()), encoding="utf-16")
    assert "is UTF-16; save it as UTF-8" in one_line_error(tmp_path / "a.jsonl", on_bad_record="skip")


def test_an_unknown_policy_is_refused(jsonl):
    with pytest.raises(ConfigError, match=r"pool\.on_bad_record: .*'ignore'"):
        read_pool(jsonl(record()), on_bad_record="ignore")


@pytest.mark.parametrize("keep", [0, 3, 200, -1, -20])
def test_a_truncated_parquet_file_is_refused(tmp_path, keep):
    path = write_parquet(tmp_path / "a.parquet", [record(candidate_id=index) for index in range(50)])
    path.write_bytes(path.read_bytes()[:keep])
    assert "is not a complete Parquet file" in one_line_error(path, on_bad_record="skip")


def test_a_parquet_file_with_a_damaged_page_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [record(candidate_id=index) for index in range(500)])
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    assert str(path) in one_line_error(path, on_bad_record="skip")


COLUMNS = {
    "problem_id": ([1.5], "column problem_id holds double; it must hold text or integers"),
    "candidate_id": ([True], "column candidate_id holds bool"),
    "teacher": ([4], "column teacher holds int64; it must hold text"),
    "messages": (["user: hi"], "column messages holds string; it must hold lists of {role, content} structs"),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_parquet_columns_of_the_wrong_type_or_missing_are_named(tmp_path, column):
    values, expected = COLUMNS[column]
    columns = {name: [value] for name, value in record().items()}
    pq.write_table(pa.table(columns | {column: values}), tmp_path / "wrong.parquet")
    assert expected in one_line_error(tmp_path / "wrong.parquet", on_bad_record="skip")
    pq.write_table(
        pa.table({name: value for name, value in columns.items() if name != column}), tmp_path / "no.parquet"
    )
    assert f"column {column} is missing" in one_line_error(tmp_path / "no.parquet", on_bad_record="skip")


def test_bad_parquet_rows_are_named_or_skipped(tmp_path):
    records = [record(candidate_id=index, answer=None) for index in range(300)]
    records[280]["teacher"] = None
    path = write_parquet(tmp_path / "a.parquet", records)
    assert one_line_error(path).startswith(f"{path}:row 281: record p1/280: field teacher: missing")
    pool = read_pool(path, on_bad_record="skip")
    assert len(pool.trajectories) == 299
    assert [item.candidate_id for item in pool.skipped] == ["280"]


def test_a_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    table = pa.Table.from_pylist([record(candidate_id=index) for index in range(3)])
    teachers = pa.array([b"t", b"\xff\xfe", b"t"], pa.binary()).view(pa.string())
    pq.write_table(
        table.set_column(table.schema.get_field_index("teacher"), "teacher", teachers), tmp_path / "a.parquet"
    )
    assert "row 2: has a text that is not UTF-8" in one_line_error(tmp_path / "a.parquet")
    pool = read_pool(tmp_path / "a.parquet", on_bad_record="skip")
    assert [item.candidate_id for item in pool.trajectories] == ["0", "2"]


def test_a_parquet_column_that_json_cannot_hold_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [record(score=float("nan"))])
    assert "field score: nan is not a number that JSON can hold" in one_line_error(path)
    path = write_parquet(tmp_path / "b.parquet", [record(blob=b"x")])
    assert "field blob: cannot be kept as JSON (a bytes)" in one_line_error(path)
