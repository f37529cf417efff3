"""The file of answers: what is in it stays there, however the process ended."""

import random

import pytest

from lark_jax.errors import JudgeError
from lark_jax.judging.answers import Answer, AnswerFile, question_key
from lark_jax.pool.records import Message

TEXTS = {"a" * 64: Answer("one\nline é \u2028", "stop"), "b" * 64: Answer("", "length"), "c" * 64: Answer("{}", "stop")}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "judge" / "answers.jsonl"
    with AnswerFile(path) as answers:
        for key, answer in TEXTS.items():
            answers.add(key, answer)
            assert answers.get(key) == answer
    return path


def test_answers_are_found_again(path):
    with AnswerFile(path) as answers:
        assert len(answers) == 3
        assert {key: answers.get(key) for key in TEXTS} == TEXTS
        assert "d" * 64 not in answers
        assert answers.get("d" * 64) is None


def test_after_a_kill_at_any_byte_complete_lines_are_kept_and_appending_works(path):
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in [0, 1, *ends, *(end - 1 for end in ends), *random.sample(range(len(whole)), 20)]:
        path.write_bytes(whole[:cut])
        with AnswerFile(path) as answers:
            expected = sum(end <= cut for end in ends)
            assert len(answers) == expected, cut
            answers.add("d" * 64, Answer("new", "stop"))
        with AnswerFile(path) as answers:
            assert len(answers) == expected + 1, cut
            assert answers.get("d" * 64) == Answer("new", "stop")


@pytest.mark.parametrize(
    "line", [b"\x00" * 20, b"[1]", b'{"key": "x"}', b'{"key": 1, "text": "", "finish_reason": ""}', b""]
)
def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_deleted(path, line):
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(JudgeError, match=r"answers\.jsonl:2: not a judge's answer; delete the line"), AnswerFile(path):
        pass
    assert path.read_bytes() == before


def test_the_key_depends_on_model_roles_texts_and_decoding():
    ask = (Message("system", "a"), Message("user", "b"))
    variants = [
        question_key("m", ask, {"max_tokens": 5}),
        question_key("n", ask, {"max_tokens": 5}),
        question_key("m", ask, {"max_tokens": 6}),
        question_key("m", ask[1:], {"max_tokens": 5}),
        question_key("m", (Message("user", "a"), Message("user", "b")), {"max_tokens": 5}),
        question_key("m", (Message("system", "ab"), Message("user", "")), {"max_tokens": 5}),
    ]
    assert len(set(variants)) == len(variants)
    assert question_key("m", ask, {"x": 1, "y": 2}) == question_key("m", ask, {"y": 2, "x": 1})
