"""LLM-judged Quality (Appendix C.2): every trajectory of a pool before a judge, each question asked once.

An answer that is of no use is asked for again, with the reason, a bounded number of times. Every step is a function of
the texts and of earlier answers, which are kept: a run that was killed goes through the same questions and finds them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lark_jax.judging.answers import Answer, AnswerFile, question_key
from lark_jax.judging.rubric import Rubric, messages_for
from lark_jax.judging.verdict import UselessAnswer, Verdict, read_verdict
from lark_jax.pool.records import Message, Trajectory


@dataclass(frozen=True)
class Question:
    key: str
    messages: tuple[Message, ...]


class Engine(Protocol):
    """Something that answers questions."""

    @property
    def model(self) -> str:
        """What the answers come from, as far as they depend on it: a name or a hash."""

    @property
    def decoding(self) -> Mapping[str, Any]:
        """Everything else that answers depend on, as JSON."""

    def ask(self, questions: Iterator[Question], count: int, answers: AnswerFile) -> Mapping[str, str]:
        """Adds an answer to each of `count` questions; returns why some have none, by key.

        Raises:
          LarkError: it makes no sense to go on; answers that came are kept.
        """


@dataclass(frozen=True)
class Judgements:
    verdicts: tuple[Verdict | None, ...]  # in the order of the trajectories
    reasons: Mapping[int, str]  # position -> why there is none
    num_asked: int  # questions put to the engine now
    num_known: int  # questions that an earlier call, or an equal text, had answered
    num_useless: int  # answers that had to be asked for again


Refusals = dict[int, tuple[str, ...]]  # position of a trajectory -> why its answers so far were of no use


def judge_trajectories(
    trajectories: Sequence[Trajectory], rubric: Rubric, engine: Engine, answers: AnswerFile, attempts: int
) -> Judgements:
    """The judge's verdict on each trajectory.

    Args:
      attempts: useful or not, so many answers are asked for at most per trajectory.

    Raises:
      LarkError: as `engine.ask`.
    """

    def question(position: int, refusals: tuple[str, ...]) -> Question:
        messages = messages_for(rubric, trajectories[position], refusals)
        return Question(question_key(engine.model, messages, engine.decoding), messages)

    verdicts: list[Verdict | None] = [None] * len(trajectories)
    reasons: dict[int, str] = {}
    pending: Refusals = dict.fromkeys(range(len(trajectories)), ())
    num_asked = num_known = num_useless = 0
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
                verdicts[position] = _verdict(answer, rubric)
                reasons.pop(position, None)
            except UselessAnswer as refusal:
                still_pending[position] = (*pending[position], str(refusal))
                reasons[position] = f"no useful answer in {attempt} attempts; the last: {refusal}"
        num_useless += len(still_pending)
        pending = still_pending
    return Judgements(tuple(verdicts), reasons, num_asked, num_known, num_useless)


def _first_of_each_new(keys: Mapping[int, str], answers: AnswerFile) -> list[int]:
    """One position for each question that has no answer yet; equal texts are one question."""
    first: dict[str, int] = {}
    for position, key in keys.items():
        if key not in answers:
            first.setdefault(key, position)
    return list(first.values())


def _verdict(answer: Answer, rubric: Rubric) -> Verdict:
    if answer.finish_reason == "length":
        raise UselessAnswer("it was cut off, so be briefer")
    if answer.finish_reason != "stop":
        raise UselessAnswer(f"it ended by {answer.finish_reason!r}")
    return read_verdict(answer.text, rubric.criteria)
