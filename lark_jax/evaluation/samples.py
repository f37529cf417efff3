"""Graded samples on disk: `<benchmark>/samples.jsonl` with texts, `samples.parquet` with everything that is counted."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.benchmark_records import Benchmark
from lark_jax.evaluation.grading import Verdict
from lark_jax.evaluation.worker.worker_records import Sample
from lark_jax.runtime.files import atomic_path, write_jsonl

SAMPLES = "samples.jsonl"
SAMPLE_TABLE = "samples.parquet"
SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("problem_id", pa.string()),
        ("level", pa.string()),  # null if the benchmark has none
        ("kind", pa.string()),
        ("gold", pa.string()),
        ("seed", pa.int64()),
        ("sample", pa.int32()),
        ("extracted", pa.string()),  # null without a box
        ("correct", pa.bool_()),
        ("reason", pa.string()),  # `grading.Verdict.reason`
        ("num_tokens", pa.int32()),
        ("truncated", pa.bool_()),  # ended at the token limit
    ]
)


@dataclasses.dataclass(frozen=True)
class GradedSample:
    """A sample and its verdict: a line of samples.jsonl."""

    problem_id: str
    seed: int
    sample: int  # its number under this seed
    text: str
    extracted: str | None
    correct: bool
    reason: str
    finish_reason: str
    num_tokens: int

    @classmethod
    def of(cls, problem_id: str, seed: int, number: int, sample: Sample, verdict: Verdict) -> "GradedSample":
        return cls(
            problem_id, seed, number, sample.text,
            verdict.extracted, verdict.correct, verdict.reason, sample.finish_reason, sample.num_tokens,
        )  # fmt: skip

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


def write_samples(out_dir: str | Path, benchmark: str, samples: Sequence[GradedSample]) -> None:
    """Writes a benchmark's samples.jsonl."""
    write_jsonl(Path(out_dir) / benchmark / SAMPLES, [dataclasses.asdict(sample) for sample in samples])


def read_samples(out_dir: str | Path, benchmark: str) -> Iterator[GradedSample]:
    """Reads a benchmark's samples.jsonl line by line: by seed, problem, sample."""
    with (Path(out_dir) / benchmark / SAMPLES).open(encoding="utf-8") as stream:
        for line in stream:
            yield GradedSample(**json.loads(line))


def write_sample_table(out_dir: str | Path, graded: Sequence[tuple[Benchmark, Sequence[GradedSample]]]) -> None:
    """Writes samples.parquet: a student's samples of all benchmarks, in the given order."""
    records = []
    for benchmark, samples in graded:
        problems = {problem.problem_id: problem for problem in benchmark.problems}
        for sample in samples:
            problem = problems[sample.problem_id]
            extracted = None if sample.extracted is None else _encodable(sample.extracted)
            values = (
                benchmark.name, sample.problem_id, problem.level, problem.kind, problem.answer, sample.seed,
                sample.sample, extracted, sample.correct, sample.reason, sample.num_tokens, sample.truncated,
            )  # fmt: skip
            records.append(dict(zip(SCHEMA.names, values, strict=True)))
    with atomic_path(Path(out_dir) / SAMPLE_TABLE) as temporary:
        pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), temporary)


def read_correctness(out_dir: str | Path) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Benchmark -> its problem ids and bool [seeds, problems, samples], from samples.parquet.

    Raises:
      EvaluationError: the file is missing, or rows of it are.
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
    """Replaces half a surrogate pair, which JSON from a server may contain and UTF-8 cannot, with a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
