"""Benchmarks by file, name or hub id, and the messages that ask a student to solve their problems."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmark_records import (
    KINDS,
    Benchmark,
    BenchmarkProblem,
    parse_json,
    read_records,
    read_text,
)
from lark_jax.evaluation.benchmark_sources import find_source
from lark_jax.evaluation.standard_benchmarks import check_standard
from lark_jax.pool.records import Message

__all__ = [
    "BUILT_IN_PROMPTS",
    "BY_KIND",
    "KINDS",
    "Benchmark",
    "BenchmarkProblem",
    "load_system_prompts",
    "prompt_messages",
    "read_benchmark",
    "require_distinct",
]

# One text per kind of answer, as in Appendix C.4 of the paper: English, reasoning first, then one boxed answer.
_SYSTEM_PROMPT = (
    "You solve problems carefully. Write everything in English. Reason first, as long as you need. "
    "When you are done, write \\boxed{%s} alone on a new last line, %s"
)
BY_KIND: Mapping[str, str] = MappingProxyType(
    {
        "number": _SYSTEM_PROMPT % ("<number>", "with nothing but the final number inside the box."),
        "letter": _SYSTEM_PROMPT % ("<letter>", "with nothing but the letter of the right choice inside the box."),
        "expression": _SYSTEM_PROMPT % ("<answer>", "with nothing but the final answer inside the box."),
    }
)
BUILT_IN_PROMPTS: Mapping[str, Mapping[str, str]] = MappingProxyType({"by_kind": BY_KIND, "none": MappingProxyType({})})


def read_benchmark(entry: str | Path) -> Benchmark:
    """The benchmark of an entry of `evaluate.benchmarks` (`benchmark_sources`), with what its name promises checked.

    Raises:
      EvaluationError: it cannot be had or read, names file, record and field; or it is not what its name promises.
    """
    source = find_source(entry)
    path = source.local_file()
    benchmark = read_records(path, source.name)
    check_standard(benchmark, str(path))
    return benchmark


def require_distinct(names: Sequence[str]) -> None:
    """Raises EvaluationError where two benchmarks share a name: results lie under it."""
    if len(set(names)) != len(names):
        raise EvaluationError(
            f"config.evaluate.benchmarks: names must differ, got {', '.join(names)}; give another one: NAME=FILE"
        )


def load_system_prompts(choice: str) -> Mapping[str, str]:
    """Kind -> system prompt for `evaluate.system_prompts`: "by_kind" (built in), "none", or a JSON file {kind: text}.

    Raises:
      EvaluationError: the file is missing, is not an object of texts, or names an unknown kind.
    """
    if choice in BUILT_IN_PROMPTS:
        return BUILT_IN_PROMPTS[choice]
    path = Path(choice)
    prompts = parse_json(read_text(path), str(path))
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise EvaluationError(f"{path}: expected one JSON object of texts, {{kind: system prompt}}")
    for kind in prompts:
        if kind not in KINDS:
            raise EvaluationError(f"{path}: unknown kind {kind!r}; known kinds: {', '.join(KINDS)}")
    return MappingProxyType(prompts)


def prompt_messages(problem: BenchmarkProblem, system_prompts: Mapping[str, str]) -> tuple[Message, ...]:
    """The conversation that the student continues; without a system turn where its kind has no prompt."""
    user = Message("user", problem.problem)
    if problem.kind not in system_prompts:
        return (user,)
    return (Message("system", system_prompts[problem.kind]), user)
