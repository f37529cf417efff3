"""The judge in a local folder: what it hands to the worker and what it takes back. The worker is a fake here."""

import json
from pathlib import Path

import pytest

from lark_jax.errors import EvaluationError, JudgeError
from lark_jax.judging import offline
from lark_jax.judging.answers import Answer, AnswerFile
from lark_jax.judging.judge import Decoding, Question, seed_of
from lark_jax.judging.offline import OfflineJudge
from lark_jax.pool.records import Message

DECODING = Decoding(40, 0.0, "schema", {"type": "object"}, {})


def question(number, text="q"):
    return Question(f"{number:064x}", (Message("system", "s"), Message("user", f"{text}{number}")))


@pytest.fixture
def judge(random_student, tmp_path):
    return OfflineJudge(random_student, "hash", DECODING, tmp_path / "work", None, tensor_parallel=1, engines=None)


@pytest.fixture
def requests(monkeypatch):
    """Requests that a worker served; it answers all, with the number of tokens of the prompt."""
    served = []

    def work(request, python, folder):  # noqa: ARG001
        served.append(request)
        lines = [{"format": 1, "fingerprint": request.fingerprint}, *(line_for(p) for p in request.prompts)]
        Path(request.output).parent.mkdir(parents=True, exist_ok=True)
        Path(request.output).write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(offline, "run_generation", work)
    return served


def line_for(prompt):
    sample = {"text": str(len(prompt.tokens)), "finish_reason": "stop", "num_tokens": 1}
    return {"benchmark": "judge", "problem_id": prompt.problem_id, "seed": 0, "samples": [sample]}


def test_questions_are_rendered_by_the_judges_own_template_and_seeded_by_their_key(judge, requests, tmp_path):
    with AnswerFile(tmp_path / "a") as answers:
        assert judge.ask(iter([question(1), question(2**250)]), 2, answers) == {}
        (request,) = requests
        text = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
        one_each = text.replace("<|im_start|>", "*").replace(
            "<|im_end|>", "*"
        )  # the tokenizer has a token per character
        assert answers.get(question(1).key) == Answer(str(len(one_each)), "stop")
    assert [request.first_seed(job) for job in request.jobs()] == [
        seed_of(question(1).key),
        seed_of(question(2**250).key),
    ]
    assert (request.engine, request.samples, request.temperature) == ("vllm", 1, 0.0)
    assert json.loads(request.answer_schema) == {"type": "object"}
    assert not list((tmp_path / "work").glob("worker_answers*"))


def test_a_prompt_that_leaves_no_room_is_listed_and_not_asked(judge, requests, tmp_path):
    with AnswerFile(tmp_path / "a") as answers:
        failures = judge.ask(iter([question(1), question(2, "x" * 450)]), 2, answers)
        assert len(answers) == 1
    assert list(failures) == [question(2).key]
    assert "leaves the judge fewer than config.score.judge.max_tokens=40" in failures[question(2).key]
    assert len(requests[0].prompts) == 1


def test_many_questions_are_several_calls(judge, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "TOKENS_PER_CALL", 100)
    with AnswerFile(tmp_path / "a") as answers:
        judge.ask((question(number) for number in range(10)), 10, answers)
        assert len(answers) == 10
    assert len(requests) > 2
    assert sum(len(request.prompts) for request in requests) == 10
    assert len({request.fingerprint for request in requests}) == len(requests)


@pytest.mark.parametrize("name", ["worker_answers.jsonl", "worker_answers.jsonl.partial"])
def test_finished_answers_of_an_interrupted_worker_are_not_asked_again(judge, requests, tmp_path, name, monkeypatch):
    def dies(request, *_):
        whole = [{"format": 1}, *(line_for(prompt) for prompt in request.prompts[:3])]
        lines = "".join(json.dumps(line) + "\n" for line in whole)
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "work" / name).write_text(lines + json.dumps(line_for(request.prompts[3]))[:-9])
        raise EvaluationError("killed")

    with AnswerFile(tmp_path / "a") as answers:
        with monkeypatch.context() as killed:
            killed.setattr(offline, "run_generation", dies)
            with pytest.raises(EvaluationError, match="killed"):
                judge.ask((question(number) for number in range(6)), 6, answers)
        judge.ask((question(number) for number in range(6)), 6, answers)
        assert len(answers) == 6
    assert [prompt.problem_id for prompt in requests[0].prompts] == [question(number).key for number in (3, 4, 5)]


def test_a_folder_without_tokenizer_is_refused_by_field(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JudgeError, match=r"score\.judge\.model: .* cannot read the tokenizer"):
        OfflineJudge(tmp_path, "hash", DECODING, tmp_path / "work", None, tensor_parallel=1, engines=None)
