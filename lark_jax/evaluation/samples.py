"""Graded samples on disk: `<benchmark>/samples.jsonl` with the texts, `samples.parquet` with all that is counted."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmarks import Benchmark
from lark_jax.runtime.files import atomic_path

SAMPLES = "samples.jsonl"
SAMPLE_TABLE = "samples.parquet"
SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("problem_id", pa.string()),
        ("level", pa.string()),  # null where the benchmark names none
        ("kind", pa.string()),
        ("gold", pa.string()),
        ("seed", pa.int64()),
        ("sample", pa.int32()),
        ("extracted", pa.string()),  # null without a box
        ("correct", pa.bool_()),
        ("reason", pa.string()),  # of the verdict: `grading.Grade.reason`
        ("num_tokens", pa.int32()),
        ("truncated", pa.bool_()),  # ended at the token limit
    ]
)


@dataclass(frozen=True)
class SampleRow:
    """A line of samples.jsonl."""

    problem_id: str
    seed: int
    sample: int
    text: str
    extracted: str | None
    correct: bool
    reason: str
    finish_reason: str
    num_tokens: int

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


def read_samples(out_dir: str | Path, benchmark: str) -> Iterator[SampleRow]:
    """The rows of a benchmark's samples.jsonl: by seed, problem, sample."""
    with (Path(out_dir) / benchmark / SAMPLES).open(encoding="utf-8") as stream:
        for line in stream:
            yield SampleRow(**json.loads(line))


def write_sample_table(out_dir: str | Path, graded: Sequence[tuple[Benchmark, Sequence[SampleRow]]]) -> None:
    """Writes samples.parquet: the samples of all benchmarks of a student, in the order given."""
    records = []
    for benchmark, rows in graded:
        problems = {problem.problem_id: problem for problem in benchmark.problems}
        for row in rows:
            problem = problems[row.problem_id]
            extracted = None if row.extracted is None else _encodable(row.extracted)
            values = (
                benchmark.name, row.problem_id, problem.level, problem.kind, problem.answer, row.seed, row.sample,
                extracted, row.correct, row.reason, row.num_tokens, row.truncated,
            )  # fmt: skip
            records.append(dict(zip(SCHEMA.names, values, strict=True)))
    with atomic_path(Path(out_dir) / SAMPLE_TABLE) as temporary:
        pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), temporary)


def read_verdicts(out_dir: str | Path) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Of each benchmark in samples.parquet: problem ids, and bool [seeds, problems, samples] in their order.

    Raises:
      EvaluationError: the file is missing, or its rows do not fill such an array.
    """
    path = Path(out_dir) / SAMPLE_TABLE
    if not path.exists():
        raise EvaluationError(f"{path}: no such file; run the stage evaluate again")
    columns = pq.read_table(path, columns=["benchmark", "problem_id", "seed", "correct"]).to_pydict()
    names = np.array(columns["benchmark"], dtype=object)
    found = {}
    for name in dict.fromkeys(columns["benchmark"]):
        rows = np.flatnonzero(names == name)
        ids = tuple(dict.fromkeys(columns["problem_id"][row] for row in rows))
        num_seeds = len({columns["seed"][row] for row in rows})
        if len(rows) % (num_seeds * len(ids)):
            raise EvaluationError(f"{path}: {name}: {len(rows)} samples of {len(ids)} problems and {num_seeds} seeds")
        correct = np.array([columns["correct"][row] for row in rows], dtype=np.bool_)
        found[name] = (ids, correct.reshape(num_seeds, len(ids), -1))
    return found


def _encodable(text: str) -> str:
    """Half a surrogate pair, which JSON of a server can hold, is no UTF-8; it becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
