"""Stage "evaluate": Acc@k of the student before and after each fine-tuning, `evaluate/<student>/`."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lark_jax.config import EvaluateConfig, Experiment
from lark_jax.errors import ConfigError, EvaluationError
from lark_jax.evaluation.benchmark_records import READING, Benchmark
from lark_jax.evaluation.benchmarks import benchmark_source, read_benchmark, require_distinct
from lark_jax.evaluation.engines import EngineChoice
from lark_jax.evaluation.generation_request import (
    engine_versions,
    require_engine,
    require_separate_seeds,
    server_for,
)
from lark_jax.evaluation.grading import grader_version
from lark_jax.evaluation.prompts import StudentPrompts, load_system_prompts, render_prompts
from lark_jax.evaluation.runner import StudentResult, engine_for, evaluate_student
from lark_jax.evaluation.standard_benchmarks import content_fingerprint, edition_of
from lark_jax.pool import SkippedRecord
from lark_jax.rendering.chat import load_chat_format
from lark_jax.runtime import files
from lark_jax.runtime.pipeline import Outcome, Task, require_manifest
from lark_jax.runtime.terminal import say
from lark_jax.stages.layout import BASE, Layout, Run
from lark_jax.stages.student import UNRECORDED, rendering_inputs, student_hash
from lark_jax.students import local_folder

ENGINE = "engine.json"
DECODING_FIELDS = ("samples", "seeds", "temperature", "top_p", "repetition_penalty", "max_tokens")
Render = Callable[[Path, tuple[Benchmark, ...]], StudentPrompts]  # a student's folder and the benchmarks


def evaluate_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    """First, once for all students, the benchmarks and the engine; then one task per student."""

    # Remembers the last student: the choice of the engine and the evaluation of the base student share its prompts.
    @functools.lru_cache(maxsize=1)
    def render(student: Path, benchmarks: tuple[Benchmark, ...]) -> StudentPrompts:
        chat = load_chat_format(student, experiment.student.chat_template)
        return render_prompts(benchmarks, chat, experiment.evaluate.system_prompts)

    students: dict[str, Callable[[], Path]] = {}
    if experiment.evaluate.include_base:
        students[BASE] = lambda: local_folder(experiment.student.path)
    students |= {run.name: functools.partial(_exported, layout, run) for run in layout.runs}
    return [
        _benchmarks_task(experiment, layout),
        _engine_task(experiment, layout, render),
        *(_student_task(experiment, layout, name, folder, render) for name, folder in students.items()),
    ]


def check_evaluation(experiment: Experiment) -> None:
    """Reads everything that students will be asked, so that errors are found before days of training, not after.

    Files that do not exist yet are left to the stage that writes them.

    Raises:
      ConfigError, EvaluationError: as the stage itself would: a benchmark or the system prompts cannot be read, two
        benchmarks share a name, decoding seeds would draw equal samples, the server's key is missing, or the engine is
        not installed.
    """
    config = experiment.evaluate
    require_distinct([benchmark_source(entry).name for entry in config.benchmarks])
    present = [entry for entry in config.benchmarks if benchmark_source(entry).local_file().exists()]
    sizes = [len(read_benchmark(entry).problems) for entry in present]
    require_separate_seeds(config.seeds, max(sizes, default=1), config.samples)
    if Path(config.system_prompts).exists():
        load_system_prompts(config.system_prompts)
    require_engine(config)
    key = config.server_key_variable
    if config.engine == "openai" and key is not None and not os.environ.get(key, "").strip():
        raise ConfigError(f"config.evaluate.server_key_variable: the environment variable {key} is not set")


def _exported(layout: Layout, run: Run) -> Path:
    require_manifest(layout.export(run), "export")
    return layout.exported_student(run)


def _benchmarks_task(experiment: Experiment, layout: Layout) -> Task:
    """Writes every problem as it is asked, and describes the benchmarks in the manifest."""

    def inputs() -> dict[str, Any]:
        return {"benchmarks": _hashed_benchmarks(experiment, layout), "reading": READING}

    def record(directory: Path) -> Outcome:
        benchmarks = benchmarks_of(experiment)
        for benchmark in benchmarks:
            problems = [dataclasses.asdict(problem) for problem in benchmark.problems]
            files.write_jsonl(directory / f"{benchmark.name}.jsonl", problems)
        notes = {benchmark.name: _described(benchmark) for benchmark in benchmarks}
        return Outcome(counts={"problems": sum(len(b.problems) for b in benchmarks)}, notes=notes)

    return Task("evaluate/benchmarks", layout.evaluation("benchmarks"), inputs, record)


def _described(benchmark: Benchmark) -> dict[str, Any]:
    edition = edition_of(benchmark)
    if edition == "unknown":
        say(f"{benchmark.name}: the number of problems is right, but their texts are not the published ones")
    return {
        "problems": len(benchmark.problems),
        "fingerprint": benchmark.fingerprint,
        "content_fingerprint": content_fingerprint(benchmark),
        "edition": edition,
    }


def _hashed_benchmarks(experiment: Experiment, layout: Layout) -> list[list[str]]:
    entries = experiment.evaluate.benchmarks
    return [[entry, layout.hashes.of(benchmark_source(entry).local_file(), EvaluationError)] for entry in entries]


def _engine_task(experiment: Experiment, layout: Layout, render: Render) -> Task:
    config = experiment.evaluate

    def inputs() -> dict[str, Any]:
        student = student_hash(layout, local_folder(experiment.student.path))
        return {
            "student": student,
            "engine": config.engine,
            "python": config.python,
            # Another version, or a later installation, repeats the health check.
            "installed": engine_versions(config.engine, config.python),
        }

    def choose(directory: Path) -> Outcome:
        folder = local_folder(experiment.student.path)
        choice = engine_for(folder, render(folder, benchmarks_of(experiment)), config, directory)
        files.write_json(directory / ENGINE, dataclasses.asdict(choice))
        versions = engine_versions(choice.engine, config.python)
        return Outcome(counts={}, notes={**dataclasses.asdict(choice), "versions": versions})

    return Task("evaluate/engine", layout.evaluation("engine"), inputs, choose, environment=("installed",))


def _student_task(
    experiment: Experiment, layout: Layout, name: str, folder: Callable[[], Path], render: Render
) -> Task:
    config = experiment.evaluate

    def inputs() -> dict[str, Any]:
        prompts = config.system_prompts
        engine = engine_of(layout).engine
        return {
            "student": student_hash(layout, folder()),
            **rendering_inputs(experiment, layout),
            "benchmarks": _hashed_benchmarks(experiment, layout),
            "system_prompts": layout.hashes.of(prompts) if Path(prompts).is_file() else prompts,
            "engine": engine,
            "engine_versions": engine_versions(engine, config.python),
            **({"served_as": server_for(config, name).model} if engine == "openai" else {}),
            "decoding": {field: getattr(config, field) for field in DECODING_FIELDS},
            "grader": grader_version(config.grader),
        }

    def evaluate(directory: Path) -> Outcome:
        student = folder()
        engine = engine_of(layout)
        _announce(name, student, engine, config, layout)
        benchmarks = benchmarks_of(experiment)
        result = evaluate_student(
            name,
            student,
            benchmarks,
            render(student, benchmarks),
            config,
            directory,
            generations_dir=layout.generations(name),
            engine=engine,
            model_fingerprint=student_hash(layout, student),
        )
        counts = {
            "problems": sum(benchmark.num_problems for benchmark in result.benchmarks),
            "samples without a box": sum(benchmark.num_unboxed for benchmark in result.benchmarks),
            "samples cut at max_tokens": sum(benchmark.num_cut for benchmark in result.benchmarks),
        }
        return Outcome(counts=counts, skipped=ungraded_samples(result))

    return Task(
        f"evaluate/{name}",
        layout.evaluation(name),
        inputs,
        evaluate,
        environment=("engine_versions",),
        unrecorded=UNRECORDED,
    )


def ungraded_samples(result: StudentResult) -> list[dict[str, str]]:
    """For the manifest: every sample that counts as wrong because the grader could not judge it."""
    return [
        dataclasses.asdict(SkippedRecord(sample.problem_id, name, benchmark.benchmark, sample.reason))
        for benchmark in result.benchmarks
        for sample in benchmark.ungraded
        for name in [f"seed {sample.seed} sample {sample.sample}"]
    ]


def engine_of(layout: Layout) -> EngineChoice:
    return EngineChoice(**files.read_json(layout.evaluation("engine") / ENGINE))


def _announce(name: str, student: Path, engine: EngineChoice, config: EvaluateConfig, layout: Layout) -> None:
    if config.engine == "auto" and engine.engine == "transformers":
        say(
            f"{name}: evaluated with transformers ({engine.reason}); to try vLLM again once that is fixed, delete "
            f"{layout.evaluation('engine')} and run again"
        )
    if engine.engine == "openai":
        say(
            f"{name}: {config.server} must serve {student} under the name {server_for(config, name).model!r} now; "
            "lark_jax cannot check what it serves"
        )


def benchmarks_of(experiment: Experiment) -> tuple[Benchmark, ...]:
    return tuple(read_benchmark(entry) for entry in experiment.evaluate.benchmarks)
