"""The paper's four benchmarks by name: where to download them, and what a file with that name must contain."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmark_records import Benchmark, BenchmarkProblem
from lark_jax.evaluation.ngrams import normalize_problem
from lark_jax.evaluation.spelling import number_value
from lark_jax.runtime.files import sha256_of_json


@dataclass(frozen=True)
class StandardBenchmark:
    num_problems: int
    kind: str  # of every answer
    hub_id: str  # a dataset of the Hugging Face hub
    file: str  # pattern of its file there
    levels: tuple[str, ...] = ()  # of its problems
    edition: str | None = None  # `content_fingerprint` of the published texts; None: unknown


STANDARD: Mapping[str, StandardBenchmark] = MappingProxyType(
    {
        "aime24": StandardBenchmark(
            30,
            "number",
            "HuggingFaceH4/aime_2024",
            "train-*.parquet",
            edition="56b50c6bde200b9159cdeb749f6ca6fce2f64d81183c4e9e7b764c934224aa2d",
        ),
        "amc83": StandardBenchmark(
            83,
            "number",
            "AI-MO/aimo-validation-amc",
            "train-*.parquet",
            edition="bed9e4e36732091f97b9b589dd5e4ce6f8369dd175c811836714d72b977ccf09",
        ),
        "gpqa_diamond": StandardBenchmark(198, "letter", "Idavidrein/gpqa", "gpqa_diamond.csv"),
        "math500": StandardBenchmark(
            500,
            "expression",
            "HuggingFaceH4/MATH-500",
            "test.jsonl",
            levels=("1", "2", "3", "4", "5"),
            edition="7b5ab807b5f3b25a4172738b46e93f956794e696286400bf2e661457e13b97bc",
        ),
    }
)


def check_standard(benchmark: Benchmark, where: str) -> None:
    """Refuses a benchmark that has a standard name and different content.

    Raises:
      EvaluationError: another number of problems, another kind of answer, or a missing or unknown level.
    """
    standard = STANDARD.get(benchmark.name)
    if standard is None:
        return
    advice = f"give your own benchmark another name: evaluate.benchmarks=NAME={where}"
    if len(benchmark.problems) != standard.num_problems:
        raise EvaluationError(
            f"{where}: {benchmark.name} has {standard.num_problems} problems, this file has "
            f"{len(benchmark.problems)}; {advice}"
        )
    for problem in benchmark.problems:
        if problem.kind != standard.kind:
            raise EvaluationError(
                f"{where}: answers of {benchmark.name} are of kind {standard.kind!r}, the answer of problem "
                f"{problem.problem_id} is {problem.kind!r} ({problem.answer[:40]!r}); {advice}"
            )
        if standard.levels and problem.level not in standard.levels:
            raise EvaluationError(
                f"{where}: problems of {benchmark.name} have a level from {standard.levels[0]} to "
                f"{standard.levels[-1]}, problem {problem.problem_id} has {problem.level!r}; {advice}"
            )


def content_fingerprint(benchmark: Benchmark) -> str:
    """A hash of problems and golds only: independent of ids, order and spacing, and of "25" or "025"."""
    return sha256_of_json(
        sorted([normalize_problem(problem.problem), _gold(problem)] for problem in benchmark.problems)
    )


def edition_of(benchmark: Benchmark) -> str:
    """Whether its texts are the published ones: "known" or "unknown" for a standard name, "own" for any other."""
    if benchmark.name not in STANDARD:
        return "own"
    return "known" if content_fingerprint(benchmark) == STANDARD[benchmark.name].edition else "unknown"


def _gold(problem: BenchmarkProblem) -> str:
    value = number_value(problem.answer) if problem.kind == "number" else None
    return problem.answer if value is None else str(value)
