"""LLM-judged Quality (Appendix C.2): a judge scores every trajectory of a pool; each question is asked once.

If an answer is unusable, the judge is asked again, with the reason, a bounded number of times. Every step depends only
on the texts and on earlier answers, which are kept, so a run that was killed repeats the same questions and finds them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lark_jax.judging.answers import Answer, AnswerFile, question_key
from lark_jax.judging.judgement import Judgement, UnusableAnswer, read_judgement
from lark_jax.judging.rubric import Rubric, messages_for
from lark_jax.pool.records import Message, Trajectory

SEED_DIGITS = 8  # hexadecimal, of a question's key: 32 bits, all that torch's CPU generator reads


@dataclass(frozen=True)
class Decoding:
    """What every judge is asked besides the messages."""

    max_tokens: int  # of an answer
    temperature: float  # 0: greedy
    structured_output: str  # "schema", "json_object" or "none"
    schema: Mapping[str, Any]  # of a usable answer
    template_arguments: Mapping[str, Any]  # for the judge's chat template

    def as_json(self) -> dict[str, Any]:
        """What answers depend on; includes the schema only if the engine gets it."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "structured_output": self.structured_output,
            "schema": self.schema if self.structured_output == "schema" else None,
            "template_arguments": self.template_arguments,
        }


def seed_of(key: str) -> int:
    """A question's seed, which depends on nothing but the question."""
    return int(key[:SEED_DIGITS], 16)


@dataclass(frozen=True)
class Question:
    key: str
    messages: tuple[Message, ...]


class Engine(Protocol):
    """Answers questions."""

    @property
    def model(self) -> str:
        """A name or hash of the model that answers."""

    @property
    def decoding(self) -> Mapping[str, Any]:
        """Everything else that answers depend on, as JSON."""

    def ask(self, questions: Iterator[Question], count: int, answers: AnswerFile) -> Mapping[str, str]:
        """Adds an answer to each of `count` questions; returns, by key, why some have none.

        Raises:
          LarkError: there is no point in continuing; answers so far are kept.
        """


@dataclass(frozen=True)
class JudgedPool:
    judgements: tuple[Judgement | None, ...]  # in the order of the trajectories
    reasons: Mapping[int, str]  # position -> why there is none
    num_asked: int  # questions sent to the engine in this call
    num_known: int  # questions already answered, by an earlier call or for an equal text
    num_unusable: int  # unusable answers


Refusals = dict[int, tuple[str, ...]]  # position of a trajectory -> why its answers so far were unusable


def judge_trajectories(
    trajectories: Sequence[Trajectory], rubric: Rubric, engine: Engine, answers: AnswerFile, attempts: int
) -> JudgedPool:
    """The judge's scores for each trajectory.

    Args:
      attempts: at most this many answers are requested per trajectory.

    Raises:
      LarkError: as `engine.ask`.
    """

    def question(position: int, refusals: tuple[str, ...]) -> Question:
        messages = messages_for(rubric, trajectories[position], refusals)
        return Question(question_key(engine.model, messages, engine.decoding), messages)

    judgements: list[Judgement | None] = [None] * len(trajectories)
    reasons: dict[int, str] = {}
    pending: Refusals = dict.fromkeys(range(len(trajectories)), ())
    num_asked = num_known = num_unusable = 0
    for attempt in range(1, attempts + 1):
        keys = {position: question(position, refusals).key for position, refusals in pending.items()}
        to_ask = _first_of_each_new(keys, answers)
        failures = engine.ask((question(n, pending[n]) for n in to_ask), len(to_ask), answers) if to_ask else {}
        num_asked += len(to_ask)
        num_known += len(keys) - len(to_ask)
        still_pending: Refusals = {}
        for position, key in keys.items():
            answer = answers.get(key)
            if answer is None:
                reasons[position] = failures[key]
                continue
            try:
                judgements[position] = _judgement(answer, rubric)
                reasons.pop(position, None)
            except UnusableAnswer as refusal:
                still_pending[position] = (*pending[position], str(refusal))
                reasons[position] = f"no useful answer in {attempt} attempts; the last: {refusal}"
        num_unusable += len(still_pending)
        pending = still_pending
    return JudgedPool(tuple(judgements), reasons, num_asked, num_known, num_unusable)


def _first_of_each_new(keys: Mapping[int, str], answers: AnswerFile) -> list[int]:
    """One position for each question without an answer; equal texts are one question."""
    first: dict[str, int] = {}
    for position, key in keys.items():
        if key not in answers:
            first.setdefault(key, position)
    return list(first.values())


def _judgement(answer: Answer, rubric: Rubric) -> Judgement:
    if answer.finish_reason == "length":
        raise UnusableAnswer("it was cut off, so be briefer")
    if answer.finish_reason != "stop":
        raise UnusableAnswer(f"it ended by {answer.finish_reason!r}")
    return read_judgement(answer.text, rubric.criteria)
