"""A judge on an OpenAI-compatible server: many chat completions at once, within its rate limit."""

from collections.abc import Iterator, Mapping
from typing import Any

from lark_jax.errors import JudgeError
from lark_jax.evaluation.worker.server_client import (
    RequestForbidden,
    RequestRefused,
    RequestUnanswered,
    ServerAccess,
    ServerClient,
    ServerUnusable,
    in_parallel,
)
from lark_jax.judging.answers import Answer, AnswerFile
from lark_jax.judging.judge import Decoding, Question, seed_of
from lark_jax.runtime import terminal

MAX_FAILURES_IN_A_ROW = 20


class ServerJudge:
    """Asks a server; every answer is kept at once."""

    def __init__(self, access: ServerAccess, model: str, decoding: Decoding, concurrency: int) -> None:
        """Raises JudgeError if the environment variable of the key is not set."""
        self.model = model  # its name: answers do not depend on the address
        self.decoding = decoding.as_json()
        self._decoding = decoding
        self._access = access
        self._concurrency = concurrency
        try:
            self._client = ServerClient(access)
        except ServerUnusable as error:
            raise JudgeError(f"config.score.judge.key_variable: {error}") from None

    def ask(self, questions: Iterator[Question], count: int, answers: AnswerFile) -> Mapping[str, str]:
        """Adds an answer to each question; returns, by key, why some have none.

        Raises:
          JudgeError: the server cannot be used, or it fails too often in a row.
        """

        def answer_to(question: Question) -> Answer:
            return self._client.post("chat/completions", self._body(question), _read_answer)

        failures: dict[str, str] = {}
        in_a_row = 0
        with terminal.progress_bar(what="judging", total=count, unit="question") as bar:
            for finished in in_parallel(answer_to, questions, self._concurrency):
                if finished.value is not None:
                    answers.add(finished.item.key, finished.value)
                    in_a_row = 0
                else:
                    failures[finished.item.key] = self._reason(finished.error)
                    # Refusals in a row may be long texts that follow each other, so they count only before the first
                    # answer; except for status 403, which a wrong key gets as well as a moderated text.
                    in_a_row += isinstance(finished.error, RequestUnanswered | RequestForbidden) or len(answers) == 0
                if in_a_row >= MAX_FAILURES_IN_A_ROW:
                    raise self._stopped(f"{in_a_row} requests in a row failed; the last: {finished.error}")
                bar.update()
        return failures

    def _reason(self, error: Exception | None) -> str:
        """Why a question has no answer; raises if the next would have none either."""
        if isinstance(error, RequestRefused | RequestUnanswered):
            return str(error)
        if isinstance(error, ServerUnusable):
            raise self._stopped(str(error)) from None
        raise error or RuntimeError("a request ended without a value")

    def _stopped(self, why: str) -> JudgeError:
        return JudgeError(
            f"judge {self.model} at {self._access.url}: {why}; run the same command again to continue, answers are kept"
        )

    def _body(self, question: Question) -> dict[str, Any]:
        decoding = self._decoding
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in question.messages],
            "max_tokens": decoding.max_tokens,
            "temperature": decoding.temperature,
            "top_p": 1.0,
            "seed": seed_of(question.key),
            "n": 1,
            "stream": False,
        }
        if decoding.structured_output == "schema":
            schema = {"name": "verdict", "strict": True, "schema": decoding.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif decoding.structured_output == "json_object":
            body["response_format"] = {"type": "json_object"}
        if decoding.template_arguments:
            body["chat_template_kwargs"] = dict(decoding.template_arguments)
        return body


def _read_answer(answer: Any) -> Answer:
    """Raises ValueError, KeyError, IndexError or TypeError for anything but one choice."""
    (choice,) = answer["choices"]
    text, reason = choice["message"]["content"], choice["finish_reason"]
    if not isinstance(text, str | None) or not isinstance(reason, str):
        raise ValueError(f"content {text!r}, finish_reason {reason!r}")
    return Answer(text or "", reason)  # no content: a refusal, or the token limit was reached while thinking
