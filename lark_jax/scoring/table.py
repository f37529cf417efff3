"""The score table: one row per candidate, the only thing that selection reads.

Statistics are means over the target tokens of one trajectory. A candidate that was not scored keeps its row, with
status "skipped", a reason, NaN statistics in Python and nulls in the file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lark_jax.errors import SelectionError
from lark_jax.rendering.chat import RenderedTrajectory
from lark_jax.runtime.files import atomic_path
from lark_jax.scoring.statistics import STATISTICS

OK = "ok"
SKIPPED = "skipped"

# float64 holds every float32 statistic exactly, so what is read back selects exactly as what was written.
SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("candidate_id", pa.string(), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("num_target_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        *(pa.field(statistic.name, pa.float64()) for statistic in STATISTICS),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
_STATISTICS = tuple(statistic.name for statistic in STATISTICS)
_OTHER_COLUMNS = tuple(name for name in SCHEMA.names if name not in _STATISTICS)


@dataclass(frozen=True)
class CandidateScore:
    """What the student's forward pass says about one candidate (paper, Section 3.2 and Appendix C.2)."""

    problem_id: str
    candidate_id: str
    teacher: str
    num_prompt_tokens: int
    num_target_tokens: int  # assistant tokens and end-of-turn token, after truncation
    truncated: bool
    statistics: Mapping[str, float]  # by name, see `scoring.statistics`; NaN where it was skipped
    status: str = OK  # or SKIPPED
    reason: str = ""  # why it was skipped
    metrics: Mapping[str, float] = field(default_factory=dict)  # additional columns, by name

    @property
    def name(self) -> str:
        """How error messages and manifests call it; the same as `Trajectory.name`."""
        return f"{self.problem_id}/{self.candidate_id}"


def candidate_score(teacher: str, rendered: RenderedTrajectory, statistics: Mapping[str, float]) -> CandidateScore:
    """The row of a candidate that went through the student; "skipped" if its loss or Brier score is not finite."""
    finite = math.isfinite(statistics["loss"]) and math.isfinite(statistics["brier"])
    return CandidateScore(
        problem_id=rendered.problem_id,
        candidate_id=rendered.candidate_id,
        teacher=teacher,
        num_prompt_tokens=len(rendered.prompt_tokens),
        num_target_tokens=len(rendered.target_tokens),
        truncated=rendered.truncated,
        statistics=statistics,
        status=OK if finite else SKIPPED,
        reason="" if finite else "non-finite loss",
    )


def skipped_score(problem_id: str, candidate_id: str, teacher: str, reason: str) -> CandidateScore:
    """The row of a candidate that could not be scored."""
    statistics = dict.fromkeys(_STATISTICS, math.nan)
    return CandidateScore(problem_id, candidate_id, teacher, 0, 0, False, statistics, SKIPPED, reason)


@dataclass(frozen=True)
class ScoreTable:
    """The score table as columns: what selection computes with. Rows in file order, one per candidate."""

    table: pa.Table  # SCHEMA, then further float64 columns

    @classmethod
    def of(cls, scores: "ScoreTable | Sequence[CandidateScore]") -> "ScoreTable":
        """Columns of these rows; metric columns in alphabetical order, a row without a metric gets a null.

        Raises:
          ValueError: a metric has the name of a fixed column.
        """
        if isinstance(scores, ScoreTable):
            return scores
        metrics = sorted({name for score in scores for name in score.metrics})
        if taken := [name for name in metrics if name in SCHEMA.names]:
            raise ValueError(f"metric {taken[0]!r} has the name of a fixed column of the score table")
        schema = pa.schema([*SCHEMA, *(pa.field(name, pa.float64()) for name in metrics)])
        columns: dict[str, list[object]] = {name: [getattr(score, name) for score in scores] for name in _OTHER_COLUMNS}
        for name in _STATISTICS:
            columns[name] = [_null_for_nan(score.statistics[name]) for score in scores]
        for name in metrics:
            columns[name] = [_null_for_nan(score.metrics.get(name, math.nan)) for score in scores]
        return cls(pa.table(columns, schema=schema))

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns."""
        return tuple(self.table.column_names)

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, float64 [rows], NaN for null."""
        return self.table.column(name).to_numpy().astype(np.float64, copy=False)

    def codes(self, name: str) -> np.ndarray:
        """A column of texts, int64 [rows]: equal texts have equal numbers, from 0 in order of first appearance."""
        return self.encoded(name)[0]

    def encoded(self, name: str) -> tuple[np.ndarray, list[str]]:
        """`codes`, and the text that each of the numbers stands for."""
        encoded = self.table.column(name).dictionary_encode().unify_dictionaries()
        codes = np.concatenate([np.zeros(0, np.int64), *(chunk.indices.to_numpy() for chunk in encoded.chunks)])
        return codes, encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []

    def texts(self, name: str, rows: Sequence[int] | np.ndarray) -> list[str]:
        """A column of texts at some of the rows."""
        return self.table.column(name).take(pa.array(rows, pa.int64())).to_pylist()

    def only(self, problem_id: str) -> "ScoreTable":
        """The rows of one problem."""
        return ScoreTable(self.table.filter(pc.equal(self.table.column("problem_id"), problem_id)))

    def rows(self) -> tuple[CandidateScore, ...]:
        metrics = self.names[len(SCHEMA) :]
        return tuple(_score_from_row(row, metrics) for row in self.table.to_pylist())


def write_scores(path: str | Path, scores: ScoreTable | Sequence[CandidateScore]) -> None:
    """Writes the table as parquet, rows in the order given; equal scores give equal bytes.

    Raises:
      ValueError: as `ScoreTable.of`.
    """
    table = ScoreTable.of(scores).table
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_scores(path: str | Path) -> tuple[CandidateScore, ...]:
    """Reads a score table, rows in file order. Floating-point columns beyond the fixed ones become `metrics`.

    Raises:
      SelectionError: as `read_score_table`.
    """
    return read_score_table(path).rows()


def read_score_table(path: str | Path) -> ScoreTable:
    """Reads a score table as columns; the fixed ones come first, in the order of `SCHEMA`.

    Raises:
      SelectionError: no such file, not parquet, a column missing, of the wrong type or with a null where none may
        be, an unknown status, or two rows for one candidate; the message names file and column or record.
    """
    table = _read_parquet(Path(path))
    _check_columns(path, table)
    further = [name for name in table.column_names if name not in SCHEMA.names]
    scores = ScoreTable(table.select([*SCHEMA.names, *further]).combine_chunks())
    _check_rows(path, scores)
    return scores


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


def _score_from_row(row: Mapping[str, Any], metrics: Sequence[str]) -> CandidateScore:
    return CandidateScore(
        **{name: row[name] for name in _OTHER_COLUMNS},
        statistics={name: _nan_for_null(row[name]) for name in _STATISTICS},
        metrics={name: _nan_for_null(row[name]) for name in metrics},
    )


def _nan_for_null(value: float | None) -> float:
    return math.nan if value is None else value


def _null_for_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _check_rows(path: str | Path, scores: ScoreTable) -> None:
    status = scores.table.column("status")
    known = pc.is_in(status, value_set=pa.array([OK, SKIPPED])).to_numpy()
    if not known.all():
        row = int(np.argmin(known))
        found = status[row].as_py()
        raise SelectionError(
            f"{_where(path, scores, row)}: column 'status' is {found!r}, expected {OK!r} or {SKIPPED!r}"
        )
    problems, candidates = scores.codes("problem_id"), scores.codes("candidate_id")
    keys = problems * (candidates.max(initial=0) + 1) + candidates
    _, first = np.unique(keys, return_index=True)
    if len(first) < len(keys):
        row = int(np.setdiff1d(np.arange(len(keys)), first)[0])
        where = _where(path, scores, row)
        raise SelectionError(f"{where}: the candidate has two rows, expected one per problem_id and candidate_id")


def _where(path: str | Path, scores: ScoreTable, row: int) -> str:
    names = (scores.texts(column, np.array([row]))[0] for column in ("problem_id", "candidate_id"))
    return f"{path}: row {row} ({'/'.join(names)})"
