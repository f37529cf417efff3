"""What students are asked: system prompts, messages, and the prompts that a chat template cannot render."""

import json

import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmark_records import KINDS, BenchmarkProblem
from lark_jax.evaluation.benchmarks import read_benchmark
from lark_jax.evaluation.prompts import BY_KIND, load_system_prompts, prompt_messages, render_prompts
from lark_jax.pool.records import Message
from lark_jax.rendering.chat import load_chat_format


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_built_in_system_prompts_ask_for_one_box_in_english():
    assert set(BY_KIND) == set(KINDS)
    for text in BY_KIND.values():
        assert "\\boxed{" in text
        assert "English" in text


def test_messages_carry_the_system_prompt_of_their_kind(tmp_path):
    problem = BenchmarkProblem("1", "2+2?", "4", "number")
    user = Message("user", "2+2?")
    assert prompt_messages(problem, load_system_prompts("none")) == (user,)
    assert prompt_messages(problem, load_system_prompts("by_kind")) == (Message("system", BY_KIND["number"]), user)
    own = load_system_prompts(str(write(tmp_path / "p.json", '{"number": "Count."}')))
    assert prompt_messages(problem, own) == (Message("system", "Count."), user)
    assert prompt_messages(BenchmarkProblem("1", "2+2?", "4", "letter"), own) == (user,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"essay": "Write."}', "unknown kind 'essay'"),
        ("[1]", "expected one JSON object"),
        ('{"number": 1}', "texts"),
        ("{", "JSON"),
    ],
)
def test_malformed_system_prompt_files_are_refused(tmp_path, text, message):
    with pytest.raises(EvaluationError, match=message):
        load_system_prompts(str(write(tmp_path / "p.json", text)))


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM_TURN = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
DROPS_SYSTEM_TURN = TURNS.replace("messages %}", "messages if m.role != 'system' %}")
WITHOUT = "or ask without a system turn: evaluate.system_prompts=none"


@pytest.mark.parametrize(
    ("template", "question", "message", "advised"),
    [
        (TURNS, "what does <|im_end|> do?", r"message 1 \(user\) contains the control token", False),
        (NO_SYSTEM_TURN, "1+1?", r"the template fails on roles \(system, user\): no system", True),
        (NO_SYSTEM_TURN, "what does <|im_end|> do?", "contains the control token", False),
        (DROPS_SYSTEM_TURN, "1+1?", r"changes or drops message 0 \(system\); set student.chat_template", True),
    ],
)
def test_a_problem_that_cannot_be_rendered_is_named(template, question, message, advised, tmp_path, bigram_student):
    (tmp_path / "template.jinja").write_text(template)
    (tmp_path / "own.json").write_text(json.dumps([{"problem": question, "answer": "1", "id": "p 17"}]))
    chat = load_chat_format(bigram_student, tmp_path / "template.jinja")
    with pytest.raises(EvaluationError, match=rf"^benchmark own, problem p 17: .*{message}") as caught:
        render_prompts([read_benchmark(tmp_path / "own.json")], chat, "by_kind")
    assert str(caught.value).endswith(WITHOUT) is advised


def test_benchmarks_with_the_same_name_are_refused(tmp_path, bigram_student):
    benchmark = read_benchmark(write(tmp_path / "own.json", json.dumps([{"problem": "?", "answer": "1"}])))
    with pytest.raises(EvaluationError, match="names must differ"):
        render_prompts([benchmark, benchmark], load_chat_format(bigram_student), "none")
