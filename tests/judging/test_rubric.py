"""The rubric file and the messages for a trajectory."""

import json

import pytest

from lark_jax.errors import JudgeError
from lark_jax.judging.judgement import read_judgement
from lark_jax.judging.rubric import BUILT_IN, messages_for, problem_of, read_rubric
from lark_jax.pool.records import Message, Trajectory

GOOD = 'criteria = ["taste"]\nuser = "{problem} and {reasoning}"\n'


def trajectory(*turns, response="Because."):
    messages = (*(Message(role, text) for role, text in turns), Message("assistant", response))
    return Trajectory("p", "c", "t", messages, "pool.jsonl:1")


def test_the_built_in_rubric_shows_an_answer_of_the_form_that_is_read():
    rubric = read_rubric(None)
    assert len(rubric.criteria) == 5  # C.2
    example = rubric.user[rubric.user.rindex('{"criteria"') :]
    assert read_judgement(example.replace("...", "x"), rubric.criteria).overall_score == 0.0
    json.loads(example)
    for criterion in rubric.criteria:
        assert f"- {criterion}:" in rubric.user


def test_texts_are_inserted_once_and_unchanged(tmp_path):
    (tmp_path / "rubric.toml").write_text(GOOD)
    rubric = read_rubric(tmp_path / "rubric.toml")
    asked = trajectory(
        ("system", "Box it."), ("user", r"What is {reasoning}\1 \frac{1}{2}?"), response="{problem} \\g<0>"
    )
    (message,) = messages_for(rubric, asked)
    assert message == Message("user", r"What is {reasoning}\1 \frac{1}{2}? and {problem} \g<0>")


def test_a_copy_of_the_built_in_file_asks_the_same(tmp_path):
    (tmp_path / "copy.toml").write_bytes(BUILT_IN.read_bytes())
    assert read_rubric(tmp_path / "copy.toml") == read_rubric(None)
    system, user = messages_for(read_rubric(None), trajectory(("user", "One plus one?")))
    assert (system.role, user.role) == ("system", "user")
    assert "One plus one?" in user.content
    assert user.content.count("Because.") == 1


def test_refusals_are_told_in_order(tmp_path):
    (tmp_path / "rubric.toml").write_text(GOOD)
    rubric = read_rubric(tmp_path / "rubric.toml")
    texts = [messages_for(rubric, trajectory(("user", "q")), ("too long", "no JSON")[:n])[-1].content for n in range(3)]
    assert len(set(texts)) == 3
    assert texts[2].startswith(texts[1])
    assert texts[2].endswith("Answer 2 was of no use: no JSON. Give one that is.")


def test_a_longer_conversation_is_one_problem_with_roles_and_without_the_system_turn():
    turns = (("system", "s"), ("user", "first"), ("assistant", "reply"), ("user", "second"))
    assert problem_of(trajectory(*turns)) == "user: first\n\nassistant: reply\n\nuser: second"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("criteria = [", "cannot be read as TOML"),
        (b"\xff\xfe", "cannot be read as TOML"),
        (None, "cannot be read as TOML"),
        (GOOD + "mood = 1", "unknown field 'mood'; known fields"),
        ('user = "{problem}{reasoning}"', "field 'criteria' must be a list of names, got None"),
        (GOOD.replace('["taste"]', "[]"), "field 'criteria' must be a list of names"),
        (GOOD.replace('["taste"]', "[1]"), "field 'criteria' must be a list of names"),
        (GOOD.replace("taste", "good taste"), "criterion 'good taste'"),
        (GOOD.replace('["taste"]', '["a", "a"]'), "has a name twice: a, a"),
        ('criteria = ["a"]', "field 'user' must be a non-empty text"),
        (GOOD.replace("{reasoning}", "it"), "field 'user' lacks {reasoning}"),
        (GOOD.replace("{problem}", "it"), "field 'user' lacks {problem}"),
        (GOOD + 'system = " "', "field 'system' must be a non-empty text"),
    ],
)
def test_invalid_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(JudgeError, match=message) as caught:
        read_rubric(path)
    assert str(path) in str(caught.value)
