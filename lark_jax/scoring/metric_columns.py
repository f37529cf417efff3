"""Further metrics of the score table: each in a file of its own, joined to the statistics afterwards.

A metric that is added later is computed alone, and the pool is not scored again. Its file, `columns.parquet`, has
problem_id, candidate_id and one float64 column per name, with a null where the metric could not be computed.
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
    """One value per candidate and column. Candidates are named once each, in any order."""

    candidates: tuple[tuple[str, str], ...]  # (problem_id, candidate_id)
    values: Mapping[str, np.ndarray]  # column -> float64 [candidates], NaN where it could not be computed

    def __post_init__(self) -> None:
        if taken := [name for name in self.values if name in SCHEMA.names]:
            raise ValueError(f"metric column {taken[0]!r} has the name of a fixed column of the score table")
        for name, column in self.values.items():
            if column.dtype != np.float64 or column.shape != (len(self.candidates),):
                raise ValueError(f"metric column {name!r} is {column.dtype} {column.shape}, expected one float64 each")
            if np.isinf(column).any():
                raise ValueError(f"metric column {name!r} has an infinite value; what cannot be computed is NaN")
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError("a candidate is named twice")

    def missing(self) -> tuple[tuple[str, str], ...]:
        """Candidates without a value in some column, in the order given."""
        nan = np.zeros(len(self.candidates), bool)
        for column in self.values.values():
            nan |= np.isnan(column)
        return tuple(self.candidates[row] for row in np.flatnonzero(nan))


def write_metric(path: str | Path, columns: MetricColumns) -> None:
    """Writes the columns as parquet, rows in the order given, columns in alphabetical order."""
    names = sorted(columns.values)
    schema = pa.schema([*(SCHEMA.field(key) for key in KEYS), *(pa.field(name, pa.float64()) for name in names)])
    keys = [pa.array([candidate[part] for candidate in columns.candidates], pa.string()) for part in range(len(KEYS))]
    values = [pa.array(columns.values[name], pa.float64(), from_pandas=True) for name in names]  # NaN becomes null
    with atomic_path(path) as temporary:
        pq.write_table(pa.table([*keys, *values], schema=schema), temporary)


def read_metric(path: str | Path) -> MetricColumns:
    """Reads what `write_metric` wrote.

    Raises:
      PipelineError: no such file, or not one of these.
    """
    try:
        table = pq.ParquetFile(path).read()
        names = [name for name in table.column_names if name not in KEYS]
        keys = (table.column(key).to_pylist() for key in KEYS)
        values = {name: table.column(name).to_numpy().astype(np.float64, copy=False) for name in names}
        return MetricColumns(tuple(zip(*keys, strict=True)), values)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PipelineError(f"{path}: not the columns of a metric ({reason}); delete its folder") from error


def join(scores: str | Path, metrics: Sequence[str | Path], joined: str | Path) -> None:
    """Writes the score table `joined`: the rows of `scores` in their order, and the columns of all `metrics`.

    Fixed columns come first, further ones in alphabetical order, as `scoring.write_scores` has them.

    Raises:
      PipelineError: a metric lacks a candidate of the table, or two metrics have a column of one name.
      SelectionError: `scores` cannot be read.
    """
    table = read_score_table(scores).table
    candidates = list(zip(*(table.column(key).to_pylist() for key in KEYS), strict=True))
    further: dict[str, pa.Array] = {}
    for path in metrics:
        columns = read_metric(path)
        rows = _rows(path, columns, candidates)
        for name, values in columns.values.items():
            if name in further or name in table.column_names:
                raise PipelineError(f"{path}: column {name!r} is in the score table already")
            further[name] = pa.array(values[rows], pa.float64(), from_pandas=True)
    for name in sorted(further):
        table = table.append_column(pa.field(name, pa.float64()), further[name])
    with atomic_path(joined) as temporary:
        pq.write_table(table, temporary)


def _rows(path: str | Path, columns: MetricColumns, candidates: Sequence[tuple[str, str]]) -> list[int]:
    """The row of each candidate in a metric's file."""
    row_of = {candidate: row for row, candidate in enumerate(columns.candidates)}
    absent = next((candidate for candidate in candidates if candidate not in row_of), None)
    if absent is not None:
        raise PipelineError(f"{path}: no row for candidate {'/'.join(absent)}; delete the folder to compute it again")
    return [row_of[candidate] for candidate in candidates]
