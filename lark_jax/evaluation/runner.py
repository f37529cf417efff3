"""One student on all benchmarks: prompts -> samples (in the worker) -> grades -> Acc@k.

Generations of a student, which another grader does not need again:
  generations.jsonl         what the worker generated, beside its request and its log
Results of a student, which follow from them:
  <benchmark>/samples.jsonl one row per sample: problem_id, seed, sample, text, extracted, correct, reason,
                            finish_reason, num_tokens
  samples.parquet           the same of all benchmarks without the texts, with level, gold and truncation
  summary.json              the `StudentResult`; written last, so its presence means that everything is there
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lark_jax.config import EvaluateConfig
from lark_jax.errors import EvaluationError
from lark_jax.evaluation.accuracy import (
    Accuracy,
    BenchmarkResult,
    LevelAccuracy,
    Ungraded,
    accuracies,
    level_accuracies,
)
from lark_jax.evaluation.benchmarks import (
    Benchmark,
    BenchmarkProblem,
    load_system_prompts,
    prompt_messages,
    require_distinct,
)
from lark_jax.evaluation.engines import (
    EngineChoice,
    Generation,
    build_request,
    choose_engine,
    fingerprint_of_all,
    read_generations,
    run_generation,
)
from lark_jax.evaluation.grading import GAVE_UP, NO_BOX, THOUGHT, Grader, grader_identity
from lark_jax.evaluation.samples import SAMPLES, SampleRow, write_sample_table
from lark_jax.evaluation.worker.worker_request import Prompt, Request
from lark_jax.pool.records import Message
from lark_jax.rendering.chat import ChatFormat, RenderRefusal, opens_thought, render_prompt
from lark_jax.runtime.files import read_json, sha256_of_bytes, sha256_of_json, sha256_of_path, write_json, write_jsonl

GENERATIONS = "generations.jsonl"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class StudentResult:
    student: str
    engine: EngineChoice
    benchmarks: tuple[BenchmarkResult, ...]
    fingerprint: str  # of model, prompts, golds and every setting that the result depends on


def evaluate_student(
    student: str,
    model_dir: str | Path,
    benchmarks: Sequence[Benchmark],
    chat: ChatFormat,
    config: EvaluateConfig,
    out_dir: str | Path,
    *,
    generations_dir: str | Path,
    engine: EngineChoice | None = None,
    model_fingerprint: str | None = None,
) -> StudentResult:
    """Acc@k of one student; returns at once when `out_dir` already holds the result of the same question.

    Args:
      student: its name in tables.
      model_dir: local folder with weights, config.json and tokenizer.
      out_dir: where results go.
      generations_dir: where samples go before they are graded. Those of an earlier call are kept and taken where they
        are asked for again; all are set aside when other weights, another decoding or engine made them.
      engine: from `engine_for`, so that all students of an experiment run under the same one; None: choose here.
      model_fingerprint: hash of the weights where the caller knows it; None: hash `model_dir`.

    Raises:
      EvaluationError: a benchmark name is used twice, a prompt is too long, or the worker or the grader fails.
    """
    model_fingerprint = model_fingerprint or sha256_of_path(model_dir)
    out_dir, generations_dir = Path(out_dir), Path(generations_dir)
    requested = engine.engine if engine is not None else config.engine
    request = _request(student, model_dir, model_fingerprint, benchmarks, chat, config, requested, generations_dir)
    golds = [benchmark.fingerprint for benchmark in benchmarks]
    fingerprint = sha256_of_json(
        [student, fingerprint_of_all(request), requested, golds, grader_identity(config.grader)]
    )
    if (out_dir / SUMMARY).exists() and read_json(out_dir / SUMMARY)["fingerprint"] == fingerprint:
        return read_student_result(out_dir)
    engine = engine or choose_engine(config, request, generations_dir)
    request = _request(student, model_dir, model_fingerprint, benchmarks, chat, config, engine.engine, generations_dir)
    _set_other_generations_aside(request)
    run_generation(request, config.python, generations_dir)
    results = _grade_all(benchmarks, request, chat, config, out_dir)
    result = StudentResult(student, engine, results, fingerprint)
    write_json(out_dir / SUMMARY, dataclasses.asdict(result))
    return result


def engine_for(
    model_dir: str | Path, benchmarks: Sequence[Benchmark], chat: ChatFormat, config: EvaluateConfig, folder: str | Path
) -> EngineChoice:
    """The engine for all students that share an architecture: accuracies compare under one engine only.

    Runs the health check with `model_dir` when `evaluate.engine` is "auto"; its log goes to `folder`.
    """
    request = _request("", model_dir, "", benchmarks, chat, config, config.engine, Path(folder))
    return choose_engine(config, request, folder)


def render_prompts(benchmarks: Sequence[Benchmark], chat: ChatFormat, system_prompts: str) -> tuple[Prompt, ...]:
    """Token ids of every problem of every benchmark, as the student saw prompts in fine-tuning.

    Raises:
      EvaluationError: two benchmarks share a name, or the chat template cannot ask a problem.
    """
    require_distinct([benchmark.name for benchmark in benchmarks])
    texts = load_system_prompts(system_prompts)
    return tuple(
        Prompt(benchmark.name, problem.problem_id, index, _prompt_tokens(chat, benchmark, problem, texts))
        for benchmark in benchmarks
        for index, problem in enumerate(benchmark.problems)
    )


def _prompt_tokens(
    chat: ChatFormat, benchmark: Benchmark, problem: BenchmarkProblem, system_prompts: Mapping[str, str]
) -> tuple[int, ...]:
    messages = prompt_messages(problem, system_prompts)
    try:
        return tuple(render_prompt(chat, messages))
    except RenderRefusal as refusal:
        line = f"benchmark {benchmark.name}, problem {problem.problem_id}: {refusal}"
        if messages[0].role == "system" and _can_render(chat, messages[1:]):
            line += ", or ask without a system turn: evaluate.system_prompts=none"
        raise EvaluationError(line) from refusal


def _can_render(chat: ChatFormat, messages: Sequence[Message]) -> bool:
    try:
        render_prompt(chat, messages)
    except RenderRefusal:
        return False
    return True


def read_student_result(out_dir: str | Path) -> StudentResult:
    """Reads summary.json back.

    Raises:
      EvaluationError: another version of this program wrote it.
    """
    path = Path(out_dir) / SUMMARY
    fields: dict[str, Any] = read_json(path)
    try:
        benchmarks = tuple(_benchmark_result(entry) for entry in fields.pop("benchmarks"))
        return StudentResult(engine=EngineChoice(**fields.pop("engine")), benchmarks=benchmarks, **fields)
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: written by another version ({error}); run the stage evaluate again") from error


def _request(
    student: str,
    model_dir: str | Path,
    model_fingerprint: str,
    benchmarks: Sequence[Benchmark],
    chat: ChatFormat,
    config: EvaluateConfig,
    engine: str,
    generations_dir: Path,
) -> Request:
    prompts = render_prompts(benchmarks, chat, config.system_prompts)
    ids = (chat.end_of_turn_id, chat.pad_id)
    output = generations_dir / GENERATIONS
    return build_request(model_dir, model_fingerprint, prompts, *ids, config, engine, output, student)


def _benchmark_result(fields: dict[str, Any]) -> BenchmarkResult:
    levels = tuple(LevelAccuracy(**{**level, "by_k": _by_k(level["by_k"])}) for level in fields.pop("levels"))
    ungraded = tuple(Ungraded(**sample) for sample in fields.pop("ungraded"))
    seeds = tuple(fields.pop("seeds"))
    return BenchmarkResult(by_k=_by_k(fields.pop("by_k")), levels=levels, ungraded=ungraded, seeds=seeds, **fields)


def _by_k(entries: list[dict[str, Any]]) -> tuple[Accuracy, ...]:
    return tuple(Accuracy(**{**entry, "per_seed": tuple(entry["per_seed"])}) for entry in entries)


def _set_other_generations_aside(request: Request) -> None:
    """Samples of other weights, another decoding or engine make way, and come back when they are asked for again."""
    header = request.header().encode() + b"\n"
    for path in (Path(request.output), Path(request.output + ".partial")):
        if path.exists() and (first_line := _first_line(path)) != header:
            aside = _aside(path, first_line)
            print(
                f"{path}: made by other weights, another decoding or another engine (or version of it); kept as "
                f"{aside.name}, generating anew",
                file=sys.stderr,
            )
            os.replace(path, aside)
        if not path.exists() and _aside(path, header).exists():
            os.replace(_aside(path, header), path)


def _aside(path: Path, first_line: bytes) -> Path:
    return path.with_name(f"{path.name}.{sha256_of_bytes(first_line)[:8]}")


def _first_line(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.readline()


def _grade_all(
    benchmarks: Sequence[Benchmark], request: Request, chat: ChatFormat, config: EvaluateConfig, out_dir: Path
) -> tuple[BenchmarkResult, ...]:
    thoughtful = frozenset(
        (prompt.benchmark, prompt.problem_id) for prompt in request.prompts if opens_thought(chat, prompt.tokens)
    )
    by_benchmark: dict[str, list[Generation]] = {benchmark.name: [] for benchmark in benchmarks}
    for generation in read_generations(request):
        by_benchmark[generation.benchmark].append(generation)
    graded = []
    with Grader(config.grader) as grader:
        for benchmark in benchmarks:
            rows = list(_sample_rows(benchmark, by_benchmark[benchmark.name], grader, thoughtful))
            write_jsonl(out_dir / benchmark.name / SAMPLES, [dataclasses.asdict(row) for row in rows])
            graded.append((benchmark, rows))
    write_sample_table(out_dir, graded)
    return tuple(_summarize(benchmark, rows, config) for benchmark, rows in graded)


def _sample_rows(
    benchmark: Benchmark, generations: Sequence[Generation], grader: Grader, thoughtful: frozenset[tuple[str, str]]
) -> Iterator[SampleRow]:
    """Samples of `thoughtful` prompts (benchmark, problem id) go on in a thought that the prompt has opened."""
    problems = {problem.problem_id: problem for problem in benchmark.problems}
    for generation in tqdm(generations, desc=f"grading {benchmark.name}", unit="problem", disable=None):
        problem = problems[generation.problem_id]
        begun = THOUGHT if (benchmark.name, problem.problem_id) in thoughtful else ""
        for index, sample in enumerate(generation.samples):
            grade = grader.grade(begun + sample.text, problem.answer, problem.kind)
            yield SampleRow(
                problem.problem_id, generation.seed, index, sample.text,
                grade.extracted, grade.correct, grade.reason, sample.finish_reason, sample.num_tokens,
            )  # fmt: skip


def _summarize(benchmark: Benchmark, rows: Sequence[SampleRow], config: EvaluateConfig) -> BenchmarkResult:
    """Rows come by seed, problem, sample; the reshape fails where one is missing, so no average ever shrinks."""
    shape = (len(config.seeds), len(benchmark.problems), config.samples)
    correct_spn = np.array([row.correct for row in rows], dtype=np.bool_).reshape(shape)
    return BenchmarkResult(
        benchmark=benchmark.name,
        fingerprint=benchmark.fingerprint,
        num_problems=len(benchmark.problems),
        samples=config.samples,
        seeds=config.seeds,
        by_k=accuracies(correct_spn),
        levels=level_accuracies(correct_spn, [problem.level for problem in benchmark.problems]),
        num_unboxed=sum(row.reason == NO_BOX for row in rows),
        num_cut=sum(row.truncated for row in rows),
        mean_tokens=sum(row.num_tokens for row in rows) / len(rows),
        ungraded=tuple(
            Ungraded(row.problem_id, row.seed, row.sample, row.reason) for row in rows if row.reason in GAVE_UP
        ),
    )
