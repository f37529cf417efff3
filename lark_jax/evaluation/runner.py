"""One student on all benchmarks: prompts -> samples (in the worker) -> verdicts -> Acc@k.

Generations of a student, which another grader can reuse:
  generations.jsonl         the worker's output, next to its request and log
Results of a student, which follow from them:
  <benchmark>/samples.jsonl one line per sample: problem_id, seed, sample, text, extracted, correct, reason,
                            finish_reason, num_tokens
  samples.parquet           the same for all benchmarks without the texts, with level, gold and truncation
  summary.json              the `StudentResult`; written last, so if it exists, everything does
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
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
from lark_jax.evaluation.benchmark_records import Benchmark
from lark_jax.evaluation.engines import EngineChoice, choose_engine, read_generations, run_generation
from lark_jax.evaluation.generation_request import build_request, request_fingerprint
from lark_jax.evaluation.grading import NO_BOX, THOUGHT, UNGRADED, Grader, grader_version
from lark_jax.evaluation.prompts import StudentPrompts
from lark_jax.evaluation.samples import GradedSample, write_sample_table, write_samples
from lark_jax.evaluation.worker.worker_records import Generation, Request
from lark_jax.runtime.files import read_json, sha256_of_bytes, sha256_of_json, sha256_of_path, write_json

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
    asked: StudentPrompts,
    config: EvaluateConfig,
    out_dir: str | Path,
    *,
    generations_dir: str | Path,
    engine: EngineChoice | None = None,
    model_fingerprint: str | None = None,
) -> StudentResult:
    """Acc@k of one student; returns at once if `out_dir` already has the result for the same inputs.

    Args:
      student: its name in tables.
      model_dir: local folder with weights, config.json and tokenizer.
      asked: the problems of `benchmarks`, from `render_prompts`.
      out_dir: where results go.
      generations_dir: where samples go before they are graded. Samples of an earlier call are reused if they are asked
        for again; all are set aside if they were made with other weights, another decoding or another engine.
      engine: from `engine_for`, so that all students of an experiment use the same one; None: choose here.
      model_fingerprint: hash of the weights, if the caller has it; None: hash `model_dir`.

    Raises:
      EvaluationError: a prompt is too long, or the worker or the grader fails.
    """
    model_fingerprint = model_fingerprint or sha256_of_path(model_dir)
    out_dir, generations_dir = Path(out_dir), Path(generations_dir)

    def request_for(name: str) -> Request:
        output = generations_dir / GENERATIONS
        return build_request(model_dir, model_fingerprint, asked, config, name, output, student)

    requested = engine.engine if engine is not None else config.engine
    request = request_for(requested)
    golds = [benchmark.fingerprint for benchmark in benchmarks]
    fingerprint = sha256_of_json(
        [student, request_fingerprint(request), requested, golds, grader_version(config.grader)]
    )
    if (out_dir / SUMMARY).exists() and read_json(out_dir / SUMMARY)["fingerprint"] == fingerprint:
        return read_student_result(out_dir)
    engine = engine or choose_engine(config, request, generations_dir)
    if engine.engine != requested:
        request = request_for(engine.engine)
    _set_other_generations_aside(request)
    run_generation(request, config.python, generations_dir)
    results = _grade_all(benchmarks, read_generations(request), asked, config, out_dir)
    result = StudentResult(student, engine, results, fingerprint)
    write_json(out_dir / SUMMARY, dataclasses.asdict(result))
    return result


def engine_for(
    model_dir: str | Path, asked: StudentPrompts, config: EvaluateConfig, folder: str | Path
) -> EngineChoice:
    """The engine for all students of one architecture: accuracies are comparable under the same engine only.

    Runs the health check with `model_dir` if `evaluate.engine` is "auto"; its log goes to `folder`.
    """
    request = build_request(model_dir, "", asked, config, config.engine, Path(folder) / GENERATIONS)
    return choose_engine(config, request, folder)


def read_student_result(out_dir: str | Path) -> StudentResult:
    """Reads summary.json.

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


def _benchmark_result(fields: dict[str, Any]) -> BenchmarkResult:
    levels = tuple(LevelAccuracy(**{**level, "by_k": _by_k(level["by_k"])}) for level in fields.pop("levels"))
    ungraded = tuple(Ungraded(**sample) for sample in fields.pop("ungraded"))
    seeds = tuple(fields.pop("seeds"))
    return BenchmarkResult(by_k=_by_k(fields.pop("by_k")), levels=levels, ungraded=ungraded, seeds=seeds, **fields)


def _by_k(entries: list[dict[str, Any]]) -> tuple[Accuracy, ...]:
    return tuple(Accuracy(**{**entry, "per_seed": tuple(entry["per_seed"])}) for entry in entries)


def _set_other_generations_aside(request: Request) -> None:
    """Renames samples of other weights, another decoding or engine; renames them back when they are asked for again."""
    header = request.header().encode() + b"\n"
    for path in (Path(request.output), Path(request.output + ".partial")):
        if path.exists() and (first_line := _first_line(path)) != header:
            aside = _aside(path, first_line)
            print(
                f"{path}: made with other weights, another decoding or another engine (or version of it); kept as "
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
    benchmarks: Sequence[Benchmark],
    generations: Iterator[Generation],
    asked: StudentPrompts,
    config: EvaluateConfig,
    out_dir: Path,
) -> tuple[BenchmarkResult, ...]:
    by_benchmark: dict[str, list[Generation]] = {benchmark.name: [] for benchmark in benchmarks}
    for generation in generations:
        by_benchmark[generation.job.prompt.benchmark].append(generation)
    graded = []
    with Grader(config.grader) as grader:
        for benchmark in benchmarks:
            samples = list(_graded_samples(benchmark, by_benchmark[benchmark.name], grader, asked.open_thoughts))
            write_samples(out_dir, benchmark.name, samples)
            graded.append((benchmark, samples))
    write_sample_table(out_dir, graded)
    return tuple(_summarize(benchmark, samples, config) for benchmark, samples in graded)


def _graded_samples(
    benchmark: Benchmark, generations: Sequence[Generation], grader: Grader, open_thoughts: frozenset[tuple[str, str]]
) -> Iterator[GradedSample]:
    """A sample whose prompt has opened a thought starts inside it, and is graded that way."""
    problems = {problem.problem_id: problem for problem in benchmark.problems}
    for generation in tqdm(generations, desc=f"grading {benchmark.name}", unit="problem", disable=None):
        _, problem_id, seed = generation.job.key
        problem = problems[problem_id]
        begun = THOUGHT if (benchmark.name, problem_id) in open_thoughts else ""
        for number, sample in enumerate(generation.samples):
            verdict = grader.grade(begun + sample.text, problem.answer, problem.kind)
            yield GradedSample.of(problem_id, seed, number, sample, verdict)


def _summarize(benchmark: Benchmark, samples: Sequence[GradedSample], config: EvaluateConfig) -> BenchmarkResult:
    """Samples are ordered by seed, problem, number; the reshape fails if one is missing, so no average ever shrinks."""
    shape = (len(config.seeds), len(benchmark.problems), config.samples)
    correct_spn = np.array([sample.correct for sample in samples], dtype=np.bool_).reshape(shape)
    return BenchmarkResult(
        benchmark=benchmark.name,
        fingerprint=benchmark.fingerprint,
        num_problems=len(benchmark.problems),
        samples=config.samples,
        seeds=config.seeds,
        by_k=accuracies(correct_spn),
        levels=level_accuracies(correct_spn, [problem.level for problem in benchmark.problems]),
        num_unboxed=sum(sample.reason == NO_BOX for sample in samples),
        num_cut=sum(sample.truncated for sample in samples),
        mean_tokens=sum(sample.num_tokens for sample in samples) / len(samples),
        ungraded=tuple(
            Ungraded(sample.problem_id, sample.seed, sample.sample, sample.reason)
            for sample in samples
            if sample.reason in UNGRADED
        ),
    )
