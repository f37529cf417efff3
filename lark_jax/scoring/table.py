"""The score table: one row per candidate, the only thing that selection reads.

Statistics are means over the target tokens of one trajectory. A candidate that was not scored keeps its row, with
status "skipped", a reason, NaN statistics in Python and nulls in the file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
import pyarrow.parquet as pq

from lark_jax.errors import SelectionError
from lark_jax.files import atomic_path

OK = "ok"
SKIPPED = "skipped"
STATISTICS = ("loss", "brier", "mean_clipped_rank", "mean_rank", "target_prob", "wrong_concentration")

# float64 holds every float32 statistic exactly, so what is read back selects exactly as what was written.
SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("candidate_id", pa.string(), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("num_target_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        *(pa.field(name, pa.float64()) for name in STATISTICS),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class CandidateScore:
    """What the student's forward pass says about one candidate (paper, Section 3.2 and Appendix C.2)."""

    problem_id: str
    candidate_id: str
    teacher: str
    num_prompt_tokens: int
    num_target_tokens: int  # assistant tokens and end-of-turn token, after truncation
    truncated: bool
    loss: float  # mean cross-entropy, nats
    brier: float  # mean Brier score, in [0, 2]
    mean_clipped_rank: float  # mean of min(rank, 100)
    mean_rank: float
    target_prob: float  # mean probability of the target token
    wrong_concentration: float  # mean of the sum of squared probabilities of the other tokens
    status: str = OK  # or SKIPPED
    reason: str = ""  # why it was skipped
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))  # one column each

    @property
    def name(self) -> str:
        """How error messages and manifests call it; the same as `Trajectory.name`."""
        return f"{self.problem_id}/{self.candidate_id}"


def skipped_score(problem_id: str, candidate_id: str, teacher: str, reason: str) -> CandidateScore:
    """The row of a candidate that could not be scored."""
    nan = math.nan
    return CandidateScore(
        problem_id, candidate_id, teacher, 0, 0, False, nan, nan, nan, nan, nan, nan, status=SKIPPED, reason=reason
    )


def write_scores(path: str | Path, scores: Sequence[CandidateScore]) -> None:
    """Writes the table as parquet, rows in the order given; equal scores give equal bytes.

    Metric columns follow the fixed ones in alphabetical order; a row without a metric gets a null.

    Raises:
      ValueError: a metric has the name of a fixed column.
    """
    metrics = sorted({name for score in scores for name in score.metrics})
    if taken := [name for name in metrics if name in SCHEMA.names]:
        raise ValueError(f"metric {taken[0]!r} has the name of a fixed column of the score table")
    schema = pa.schema([*SCHEMA, *(pa.field(name, pa.float64()) for name in metrics)])
    columns: dict[str, list[object]] = {name: [getattr(score, name) for score in scores] for name in SCHEMA.names}
    for name in metrics:
        columns[name] = [score.metrics.get(name, math.nan) for score in scores]
    for name in (*STATISTICS, *metrics):
        columns[name] = [None if math.isnan(value) else value for value in columns[name]]  # type: ignore[arg-type]
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary)


def read_scores(path: str | Path) -> tuple[CandidateScore, ...]:
    """Reads a score table, rows in file order. Floating-point columns beyond the fixed ones become `metrics`.

    Raises:
      SelectionError: no such file, not parquet, a column missing, of the wrong type or with a null where none may
        be, an unknown status, or two rows for one candidate; the message names file and column or record.
    """
    table = read_scores_file(path)
    metrics = [name for name in table.column_names if name not in SCHEMA.names]
    scores = tuple(_score_from_row(row, metrics) for row in table.to_pylist())
    _check_rows(path, scores)
    return scores


def read_scores_file(path: str | Path) -> pa.Table:
    """The score table as it lies in the file, columns checked, rows not.

    Raises:
      SelectionError: as `read_scores`, but for what it says about rows.
    """
    table = _read_parquet(Path(path))
    _check_columns(path, table)
    return table


def _read_parquet(path: Path) -> pa.Table:
    if not path.is_file():
        raise SelectionError(f"{path}: no such score table; run the stage 'score' first")
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowInvalid, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SelectionError(f"{path}: not a readable parquet file ({first_line}); score again") from error


def _check_columns(path: str | Path, table: pa.Table) -> None:
    for expected in SCHEMA:
        if expected.name not in table.column_names:
            raise SelectionError(f"{path}: column {expected.name!r} is missing from the score table")
        column = table.column(expected.name)
        if column.type != expected.type:
            raise SelectionError(f"{path}: column {expected.name!r} is {column.type}, expected {expected.type}")
        if not expected.nullable and column.null_count:
            raise SelectionError(f"{path}: column {expected.name!r} has {column.null_count} null(s), none is allowed")
    for found in table.schema:
        if found.name not in SCHEMA.names and not pa.types.is_floating(found.type):
            raise SelectionError(f"{path}: column {found.name!r} is {found.type}, expected a floating-point metric")


def _score_from_row(row: Mapping[str, object], metrics: Sequence[str]) -> CandidateScore:
    fixed = {name: _nan_for_null(row[name]) for name in SCHEMA.names}
    further = MappingProxyType({name: _nan_for_null(row[name]) for name in metrics})
    return CandidateScore(**fixed, metrics=further)  # type: ignore[arg-type]


def _nan_for_null(value: object) -> object:
    return math.nan if value is None else value


def _check_rows(path: str | Path, scores: Sequence[CandidateScore]) -> None:
    seen: set[tuple[str, str]] = set()
    for row, score in enumerate(scores):
        where = f"{path}: row {row} ({score.name})"
        if score.status not in (OK, SKIPPED):
            raise SelectionError(f"{where}: column 'status' is {score.status!r}, expected {OK!r} or {SKIPPED!r}")
        if (score.problem_id, score.candidate_id) in seen:
            raise SelectionError(f"{where}: the candidate has two rows, expected one per problem_id and candidate_id")
        seen.add((score.problem_id, score.candidate_id))
