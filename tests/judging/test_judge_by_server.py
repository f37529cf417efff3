"""A judge on a scripted server: what it is asked, which answers are kept, which failures are listed.

How the HTTP client treats each kind of failure is tested in `evaluation/test_server_client.py`.
"""

import itertools
import json
import threading
import time

import pytest
from scripted_server import Reply, chat_answer, json_reply, serving

from lark_jax.errors import JudgeError
from lark_jax.evaluation.worker import server_client
from lark_jax.evaluation.worker.server_client import ServerAccess
from lark_jax.judging.answers import AnswerFile
from lark_jax.judging.judge import Decoding, judge_trajectories
from lark_jax.judging.judgement import answer_schema
from lark_jax.judging.rubric import Rubric
from lark_jax.judging.server import MAX_FAILURES_IN_A_ROW, ServerJudge
from lark_jax.pool.records import Message, Trajectory

RUBRIC = Rubric(("taste",), None, "P {problem} R {reasoning}")
DECODING = Decoding(64, 0.0, "schema", answer_schema(RUBRIC.criteria), {"enable_thinking": False})
KEY = "sk-judge-5678"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(server_client, "FIRST_BACKOFF_S", 0.001)


def pool_of(*responses):
    return [
        Trajectory("p", f"c{index}", "t", (Message("user", "q"), Message("assistant", text)), f"pool:{index}")
        for index, text in enumerate(responses)
    ]


def good(score=0.5):
    answer = {"criteria": {"taste": {"reason": "r", "score": 1}}, "overall_reason": "o", "overall_score": score}
    return chat_answer(json.dumps(answer))


def response_in(asked):
    """The trajectory that a request is about."""
    return asked.body["messages"][-1]["content"].split(" R ")[1].split("\n")[0]


def judge(server, trajectories, path, *, attempts=3, concurrency=4, retries=1, decoding=DECODING, **access):
    access = ServerAccess(server.url, access.get("key"), 5.0, retries, access.get("per_minute"))
    with AnswerFile(path) as answers:
        engine = ServerJudge(access, "big-judge", decoding, concurrency)
        return judge_trajectories(trajectories, RUBRIC, engine, answers, attempts)


def scores_of(judged):
    return [judgement and judgement.overall_score for judgement in judged.judgements]


def test_each_trajectory_gets_its_own_score_in_any_order_of_answers(tmp_path):
    def script(asked, _):
        time.sleep((int(response_in(asked)) * 7 % 5) / 500)
        return good(int(response_in(asked)) / 100)

    with serving(script) as server:
        judged = judge(server, pool_of(*map(str, range(40))), tmp_path / "a", concurrency=8)
        assert 1 < server.most_at_once <= 8
    assert scores_of(judged) == [number / 100 for number in range(40)]
    assert (judged.num_asked, judged.num_known, judged.num_unusable, judged.reasons) == (40, 0, 0, {})


def test_what_a_server_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda *_: good()) as server:
        judge(server, pool_of("x"), tmp_path / "a", key="JUDGE_KEY")
        (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.body["messages"] == [{"role": "user", "content": "P q R x"}]
    assert (asked.body["model"], asked.body["max_tokens"], asked.body["temperature"]) == ("big-judge", 64, 0.0)
    assert asked.body["response_format"]["json_schema"]["schema"] == answer_schema(RUBRIC.criteria)
    assert asked.body["chat_template_kwargs"] == {"enable_thinking": False}
    assert KEY not in (tmp_path / "a").read_text()


@pytest.mark.parametrize(("mode", "expected"), [("json_object", {"type": "json_object"}), ("none", None)])
def test_servers_without_schemas_are_sent_none(tmp_path, mode, expected):
    with serving(lambda *_: good()) as server:
        judge(server, pool_of("x"), tmp_path / "a", decoding=Decoding(64, 0.0, mode, {}, {}))
        assert server.asked[0].body.get("response_format") == expected
        assert "chat_template_kwargs" not in server.asked[0].body


def test_equal_texts_are_asked_once_and_a_second_run_asks_nothing(tmp_path):
    with serving(lambda *_: good()) as server:
        first = judge(server, pool_of("same", "other", "same"), tmp_path / "a")
        again = judge(server, pool_of("other", "same"), tmp_path / "a")
        assert len(server.asked) == 2
    assert (first.num_asked, first.num_known) == (2, 1)
    assert (again.num_asked, again.num_known) == (0, 2)
    assert scores_of(first) == [0.5] * 3


UNUSABLE = {  # `test_judgement.py` has every form of the text
    "prose": (chat_answer("I would say 0.8"), "not one JSON object"),
    "no content": (chat_answer(None), "not one JSON object"),
    "cut off": (chat_answer("{", reason="length"), "it was cut off, so be briefer"),
    "filtered": (chat_answer("", reason="content_filter"), "it ended by 'content_filter'"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_answer_is_asked_for_again_with_the_reason(tmp_path, name):
    reply, reason = UNUSABLE[name]
    with serving(lambda _, number: reply if number < 2 else good()) as server:
        judged = judge(server, pool_of("x"), tmp_path / "a", attempts=3, concurrency=1)
        last = server.asked[2].body["messages"][-1]["content"]
    assert scores_of(judged) == [0.5]
    assert judged.num_unusable == 2
    assert reason in last
    assert "Answer 1 was of no use" in last
    assert "Answer 2 was of no use" in last


def test_attempts_are_bounded_listed_and_continued_by_a_larger_bound(tmp_path):
    reply, reason = UNUSABLE["cut off"]
    with serving(lambda asked, _: reply if response_in(asked) == "bad" else good()) as server:
        judged = judge(server, pool_of("fine", "bad"), tmp_path / "a", attempts=2)
        assert len(server.asked) == 3
        assert scores_of(judged) == [0.5, None]
        assert reason in judged.reasons[1]
        assert judged.reasons[1].startswith("no useful answer in 2 attempts; the last: ")
        more = judge(server, pool_of("fine", "bad"), tmp_path / "a", attempts=3)
        assert len(server.asked) == 4  # the two unusable answers were known
    assert more.reasons[1].startswith("no useful answer in 3 attempts")


FAILURES = {
    "no answer": Reply(500, b"oh"),
    "two choices": json_reply({"choices": [{}, {}]}),
    "refused": json_reply({"error": {"message": "maximum context length is 8"}}, 400),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_request_that_fails_is_listed_not_kept_and_asked_again_by_the_next_run(tmp_path, name):
    with serving(lambda asked, _: FAILURES[name] if response_in(asked) == "bad" else good()) as server:
        judged = judge(server, pool_of("a", "bad", "b"), tmp_path / "a")
        assert scores_of(judged) == [0.5, None, 0.5]
        assert list(judged.reasons) == [1]
        before = len(server.asked)
        server.script = lambda *_: good(0.25)
        again = judge(server, pool_of("a", "bad", "b"), tmp_path / "a")
        assert len(server.asked) == before + 1
    assert scores_of(again) == [0.5, 0.25, 0.5]


def test_all_threads_wait_out_a_flood_of_429(tmp_path):
    lock, times = threading.Lock(), []

    def script(*_):
        with lock:
            times.append(time.monotonic())
            refused = len(times) <= 6
        return json_reply({"error": "too many"}, 429, Retry_After="0.3") if refused else good()

    with serving(script) as server:
        judged = judge(server, pool_of(*map(str, range(20))), tmp_path / "a", retries=0, concurrency=6)
        assert len(server.asked) == 26
    assert judged.reasons == {}
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) > 0.25


def test_the_rate_limit_is_kept(tmp_path):
    with serving(lambda *_: good()) as server:
        started = time.monotonic()
        judge(server, pool_of(*map(str, range(11))), tmp_path / "a", concurrency=8, per_minute=1_200.0)
        assert len(server.asked) == 11
    assert time.monotonic() - started >= 10 / 20


def test_an_unusable_server_ends_the_run_at_once_with_address_and_reason(tmp_path):
    with serving(lambda *_: json_reply({"error": {"message": "the model `x` does not exist"}}, 404)) as server:
        with pytest.raises(JudgeError, match=r"big-judge at http://.*HTTP 404: the model `x`") as caught:
            judge(server, pool_of(*map(str, range(50))), tmp_path / "a", concurrency=2)
        assert len(server.asked) <= 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [500, 400])
def test_a_server_that_never_answers_ends_the_run_after_a_row_of_failures(tmp_path, status):
    with serving(lambda *_: json_reply({"error": "response_format is not known here"}, status)) as server:
        with pytest.raises(
            JudgeError, match=f"{MAX_FAILURES_IN_A_ROW} requests in a row failed; the last: HTTP {status}"
        ):
            judge(server, pool_of(*map(str, range(100))), tmp_path / "a", retries=0, concurrency=1)
        assert len(server.asked) <= MAX_FAILURES_IN_A_ROW + 1


def test_many_long_texts_in_a_row_do_not_end_a_run(tmp_path):
    def script(asked, _):
        return json_reply({"error": "too long"}, 400) if response_in(asked).startswith("long") else good()

    responses = ["short", *(f"long{index}" for index in range(MAX_FAILURES_IN_A_ROW + 5)), "short2"]
    with serving(script) as server:
        judged = judge(server, pool_of(*responses), tmp_path / "a", concurrency=1)
        again = judge(server, pool_of(*responses), tmp_path / "a", concurrency=1)  # now they are all that is asked
    assert len(judged.reasons) == MAX_FAILURES_IN_A_ROW + 5
    assert again.reasons == judged.reasons


def test_a_text_that_a_gateway_forbids_is_one_failure_in_this_run_and_in_the_next(tmp_path):
    def moderated(asked, _):
        return json_reply({"error": "moderation"}, 403) if response_in(asked) == "bad" else good()

    with serving(moderated) as server:
        judged = judge(server, pool_of("bad", "a", "b"), tmp_path / "a", concurrency=1)
        again = judge(server, pool_of("bad", "a", "b"), tmp_path / "a", concurrency=1)
    assert scores_of(judged) == scores_of(again) == [None, 0.5, 0.5]
    assert judged.reasons == {0: "HTTP 403: moderation"}
    assert again.num_asked == 1


@pytest.mark.parametrize("answered", [0, 1])
def test_a_key_that_is_always_forbidden_ends_the_run(tmp_path, answered):
    with serving(lambda _, number: good() if number < answered else json_reply({"error": "no"}, 403)) as server:
        with pytest.raises(
            JudgeError, match=f"{MAX_FAILURES_IN_A_ROW} requests in a row failed; the last: HTTP 403: no"
        ):
            judge(server, pool_of(*map(str, range(100))), tmp_path / "a", concurrency=1)
        assert len(server.asked) <= MAX_FAILURES_IN_A_ROW + 2


def test_answers_that_came_before_the_end_are_kept(tmp_path):
    with serving(lambda _, number: good() if number < 5 else Reply(401, b"")) as server:
        with pytest.raises(JudgeError, match="answers are kept"):
            judge(server, pool_of(*map(str, range(30))), tmp_path / "a", concurrency=1)
        with AnswerFile(tmp_path / "a") as answers:
            assert len(answers) == 5
        server.script = lambda *_: good()
        judged = judge(server, pool_of(*map(str, range(30))), tmp_path / "a")
    assert (judged.num_asked, judged.num_known) == (25, 5)


def test_a_missing_key_is_named_by_its_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with (
        serving(lambda *_: good()) as server,
        pytest.raises(JudgeError, match=r"score\.judge\.key_variable: .*JUDGE_KEY"),
    ):
        judge(server, pool_of("x"), tmp_path / "a", key="JUDGE_KEY")
