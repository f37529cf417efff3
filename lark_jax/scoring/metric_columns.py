"""Additional metrics of the score table: each has its own file, which is joined to the statistics.

Adding a metric therefore does not score the pool again. Its file, `columns.parquet`, has problem_id, candidate_id and
float64 columns, null where the metric could not be computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark_jax.errors import PipelineError
from lark_jax.runtime.files import atomic_path
from lark_jax.scoring.table import SCHEMA, read_score_table

KEYS = ("problem_id", "candidate_id")


@dataclass(frozen=True)
class MetricColumns:
    """One value per candidate and column. Each candidate appears once, in any order."""

    candidates: tuple[tuple[str, str], ...]  # (problem_id, candidate_id)
    values: Mapping[str, np.ndarray]  # column -> float64 [candidates], NaN where it could not be computed

    def __post_init__(self) -> None:
        if taken := [name for name in self.values if name in SCHEMA.names]:
            raise ValueError(f"metric column {taken[0]!r} has the name of a fixed column of the score table")
        for name, column in self.values.items():
            if column.dtype != np.float64 or column.shape != (len(self.candidates),):
                raise ValueError(f"metric column {name!r} is {column.dtype} {column.shape}, expected one float64 each")
            if np.isinf(column).any():
                raise ValueError(f"metric column {name!r} has an infinite value, expected NaN where there is none")
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError("a candidate appears twice")

    def missing(self) -> tuple[tuple[str, str], ...]:
        """Candidates without a value in at least one column, in the given order."""
        nan = np.zeros(len(self.candidates), bool)
        for column in self.values.values():
            nan |= np.isnan(column)
        return tuple(self.candidates[row] for row in np.flatnonzero(nan))


def write_metric(path: str | Path, columns: MetricColumns) -> None:
    """Writes the columns as parquet, rows in the given order, columns in alphabetical order."""
    names = sorted(columns.values)
    schema = pa.schema([*(SCHEMA.field(key) for key in KEYS), *(pa.field(name, pa.float64()) for name in names)])
    keys = [pa.array([candidate[part] for candidate in columns.candidates], pa.string()) for part in range(len(KEYS))]
    values = [pa.array(columns.values[name], pa.float64(), from_pandas=True) for name in names]  # NaN becomes null
    with atomic_path(path) as temporary:
        pq.write_table(pa.table([*keys, *values], schema=schema), temporary)


def read_metric(path: str | Path) -> MetricColumns:
    """Reads a file of `write_metric`.

    Raises:
      PipelineError: the file is missing or not such a file.
    """
    try:
        table = pq.ParquetFile(path).read()
        names = [name for name in table.column_names if name not in KEYS]
        keys = (table.column(key).to_pylist() for key in KEYS)
        values = {name: table.column(name).to_numpy().astype(np.float64, copy=False) for name in names}
        return MetricColumns(tuple(zip(*keys, strict=True)), values)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PipelineError(
            f"{path}: not the columns of a metric ({reason}); delete its folder and run again"
        ) from error


def join(scores: str | Path, metrics: Sequence[str | Path], joined: str | Path) -> None:
    """Writes the score table `joined`: the rows of `scores` in their order, and the columns of all `metrics`.

    The columns of `SCHEMA` come first, the others in alphabetical order, as in `scoring.write_scores`.

    Raises:
      PipelineError: a metric lacks a candidate of the table, or two metrics have a column of the same name.
      SelectionError: `scores` cannot be read.
    """
    table = read_score_table(scores).table
    candidates = list(zip(*(table.column(key).to_pylist() for key in KEYS), strict=True))
    additional: dict[str, pa.Array] = {}
    for path in metrics:
        columns = read_metric(path)
        rows = _rows(path, columns, candidates)
        for name, values in columns.values.items():
            if name in additional or name in table.column_names:
                raise PipelineError(f"{path}: column {name!r} is already in the score table")
            additional[name] = pa.array(values[rows], pa.float64(), from_pandas=True)
    for name in sorted(additional):
        table = table.append_column(pa.field(name, pa.float64()), additional[name])
    with atomic_path(joined) as temporary:
        pq.write_table(table, temporary)


def _rows(path: str | Path, columns: MetricColumns, candidates: Sequence[tuple[str, str]]) -> list[int]:
    """The row of each candidate in a metric's file."""
    row_of = {candidate: row for row, candidate in enumerate(columns.candidates)}
    missing = next((candidate for candidate in candidates if candidate not in row_of), None)
    if missing is not None:
        raise PipelineError(f"{path}: no row for candidate {'/'.join(missing)}; delete its folder and run again")
    return [row_of[candidate] for candidate in candidates]
