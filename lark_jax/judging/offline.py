"""A judge in a local folder, run by vLLM in the evaluation's worker process, on all GPUs of the machine.

Questions become token ids by the judge's own chat template. The worker appends each finished answer to its file; the
file of an interrupted call is read first, whichever questions it holds.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lark_jax.errors import JudgeError, one_line
from lark_jax.evaluation.engines import run_generation
from lark_jax.evaluation.generation_request import read_model_json, stop_ids_of
from lark_jax.evaluation.worker.worker_records import Prompt, Request
from lark_jax.judging.answers import Answer, AnswerFile
from lark_jax.judging.judge import Decoding, Question, seed_of
from lark_jax.runtime.files import sha256_of_json

TOKENS_PER_CALL = 16_000_000  # of prompts per worker call: about 100 MB of JSON, roughly an hour of a large judge
NAME = "judge"  # takes the place of a benchmark's name


class OfflineJudge:
    """Asks vLLM, many questions per call."""

    def __init__(
        self,
        folder: Path,
        model_hash: str,
        decoding: Decoding,
        work: Path,
        python: str | None,
        tensor_parallel: int,
        engines: int | None,
    ) -> None:
        """`work` is the folder for the worker's files; `engines` run at once, None: as many as the GPUs allow.

        Raises:
          JudgeError: the tokenizer cannot be read or has no chat template.
          EvaluationError: config.json cannot be read.
        """
        self.model = model_hash
        self.decoding = decoding.as_json()
        self._decoding = decoding
        self._folder, self._work = folder, work
        self._python, self._tensor_parallel, self._engines = python, tensor_parallel, engines
        self._tokenizer = _load_tokenizer(folder)
        self._config = read_model_json(folder / "config.json")
        self._stop_ids = stop_ids_of(folder, self._config, self._tokenizer.eos_token_id)

    def ask(self, questions: Iterator[Question], count: int, answers: AnswerFile) -> Mapping[str, str]:  # noqa: ARG002
        """Adds an answer to each question; returns, by key, why some have none.

        Raises:
          EvaluationError: the worker failed; its finished answers are kept.
        """
        self._take_answers(answers)
        failures: dict[str, str] = {}
        while prompts := self._next_prompts(questions, answers, failures):
            run_generation(self._request(prompts), self._python, self._work)
            self._take_answers(answers)
        return failures

    def _next_prompts(
        self, questions: Iterator[Question], answers: AnswerFile, failures: dict[str, str]
    ) -> tuple[Prompt, ...]:
        """Takes the questions of one call; those that cannot be asked become failures."""
        prompts: list[Prompt] = []
        num_tokens = 0
        for question in questions:
            if question.key in answers:  # from an interrupted call
                continue
            tokens = self._tokens(question)
            room = self._config.get("max_position_embeddings", len(tokens) + self._decoding.max_tokens) - len(tokens)
            if room < self._decoding.max_tokens:
                failures[question.key] = (
                    f"the prompt has {len(tokens):,} tokens and leaves the judge fewer than "
                    f"config.score.judge.max_tokens={self._decoding.max_tokens:,}"
                )
                continue
            prompts.append(Prompt(NAME, question.key, seed_of(question.key), tokens))
            num_tokens += len(tokens)
            if num_tokens >= TOKENS_PER_CALL:
                break
        return tuple(prompts)

    def _tokens(self, question: Question) -> tuple[int, ...]:
        turns = [{"role": message.role, "content": message.content} for message in question.messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False, **self._decoding.template_arguments
            )
        except Exception as error:  # templates raise anything; it would happen for every question
            raise JudgeError(
                f"{self._folder}: its chat template rejects the rubric's turns ({one_line(error)})"
            ) from error
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _request(self, prompts: tuple[Prompt, ...]) -> Request:
        decoding = self._decoding
        schema = {"schema": decoding.schema, "json_object": {"type": "object"}}.get(decoding.structured_output)
        return Request(
            fingerprint=sha256_of_json([self.model, self.decoding, sorted(prompt.problem_id for prompt in prompts)]),
            engine="vllm",
            model=str(self._folder.resolve()),
            output=str(self._output.resolve()),
            dtype=self._config.get("dtype") or self._config.get("torch_dtype") or "auto",
            tensor_parallel=self._tensor_parallel,
            max_model_len=max(len(prompt.tokens) for prompt in prompts) + decoding.max_tokens,
            max_tokens=decoding.max_tokens,
            stop_ids=self._stop_ids,
            pad_id=self._stop_ids[0],
            samples=1,
            seeds=(0,),
            temperature=decoding.temperature,
            top_p=1.0,
            repetition_penalty=1.0,
            prompts=prompts,
            answer_schema=json.dumps(schema) if schema is not None else None,
            engines=self._engines,
        )

    @property
    def _output(self) -> Path:
        return self._work / "worker_answers.jsonl"

    def _take_answers(self, answers: AnswerFile) -> None:
        """Moves finished answers of the worker, from this call or an interrupted one, to the kept answers."""
        for path in (self._output, self._output.with_name(self._output.name + ".partial")):
            if not path.exists():
                continue
            for key, answer in _finished(path):
                if key not in answers:
                    answers.add(key, answer)
            path.unlink()


def _finished(path: Path) -> Iterator[tuple[str, Answer]]:
    """Keys and answers in a worker's file, after its header. Unreadable lines are skipped: they are asked again."""
    with path.open("rb") as stream:
        for line in itertools.islice(stream, 1, None):
            try:
                record = json.loads(line)
                (sample,) = record["samples"]
                yield record["problem_id"], Answer(sample["text"], sample["finish_reason"])
            except (ValueError, KeyError, TypeError):  # incomplete: the worker was killed
                continue


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # slow to import, and not needed to ask a server

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise JudgeError(
            f"config.score.judge.model: {folder}: cannot read the tokenizer ({one_line(error)})"
        ) from error
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise JudgeError(
            f"config.score.judge.model: {folder}: the tokenizer has no chat template or no end-of-sequence token"
        )
    return tokenizer
