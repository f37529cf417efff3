"""A selection as training files, and back: train.jsonl, train.parquet, dataset_info.json for LLaMA-Factory."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lark_jax.errors import SelectionError
from lark_jax.files import atomic_path, write_json, write_jsonl
from lark_jax.pool.records import ROLES, Message, Pool, Trajectory
from lark_jax.selection.selector import Choice, Selection

TRAIN_JSONL = "train.jsonl"
TRAIN_PARQUET = "train.parquet"
DATASET_INFO = "dataset_info.json"

_IDENTITY = ("problem_id", "candidate_id", "teacher")
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_META = pa.struct(
    [
        *((name, pa.string()) for name in _IDENTITY),
        ("score", pa.float64()),
        ("rank", pa.int32()),
    ]
)
TRAIN_SCHEMA = pa.schema([("messages", pa.list_(_MESSAGE)), ("weight", pa.float64()), ("meta", _META)])


@dataclass(frozen=True)
class WeightedTrajectory:
    trajectory: Trajectory
    weight: float  # q_k of Eq. 1, > 0; sums to 1 over the trajectories of a problem


def write_selection(selection: Selection, pool: Pool, directory: str | Path) -> None:
    """Writes the chosen trajectories of positive weight, messages exactly as in the pool, in the order of the choices.

    Each row: `messages`, `weight`, `meta` with problem_id, candidate_id, teacher, score and rank. Equal arguments give
    equal bytes. Choices of weight 0 would train nothing; they stay in `selection.counts`.

    Raises:
      SelectionError: the pool does not hold a chosen candidate.
    """
    directory = Path(directory)
    rows = list(_rows(selection, pool))
    write_jsonl(directory / TRAIN_JSONL, rows)
    with atomic_path(directory / TRAIN_PARQUET) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=TRAIN_SCHEMA), temporary)
    write_json(directory / DATASET_INFO, _dataset_info(selection.name))


def read_training_set(directory: str | Path) -> tuple[WeightedTrajectory, ...]:
    """Reads `train.jsonl` as written by `write_selection`, rows in file order.

    Raises:
      SelectionError: the file is missing or a row breaks the format; the message names file, line and field.
    """
    path = Path(directory) / TRAIN_JSONL
    if not path.is_file():
        raise SelectionError(f"{path}: no such training file; run the stage 'select' first")
    with path.open(encoding="utf-8") as lines:
        return tuple(_weighted_trajectory(line, f"{path}:{number}") for number, line in enumerate(lines, start=1))


def _rows(selection: Selection, pool: Pool) -> Iterator[dict[str, Any]]:
    trajectories = pool.by_ids()
    for choice in selection.choices:
        trajectory = trajectories.get((choice.problem_id, choice.candidate_id))
        if trajectory is None:
            name = f"{choice.problem_id}/{choice.candidate_id}"
            raise SelectionError(f"selection {selection.name}: the pool has no candidate {name}; score this pool again")
        if choice.weight > 0:
            yield _row(choice, trajectory)


def _row(choice: Choice, trajectory: Trajectory) -> dict[str, Any]:
    return {
        "messages": [{"role": message.role, "content": message.content} for message in trajectory.messages],
        "weight": choice.weight,
        "meta": {
            "problem_id": choice.problem_id,
            "candidate_id": choice.candidate_id,
            "teacher": choice.teacher,
            "score": choice.score,
            "rank": choice.rank,
        },
    }


def _dataset_info(name: str) -> dict[str, Any]:
    """LLaMA-Factory's description of role/content messages. It knows no weights: it trains with equal ones."""
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    columns = {"messages": "messages"}
    return {name: {"file_name": TRAIN_JSONL, "formatting": "sharegpt", "columns": columns, "tags": tags}}


def _weighted_trajectory(line: str, location: str) -> WeightedTrajectory:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SelectionError(f"{location}: not a JSON document ({error.msg}); select again") from error
    weight = _field(row, "weight", float, location)
    if not 0 < weight < math.inf:
        raise SelectionError(f"{location}: field 'weight' is {weight}, expected a positive number")
    meta = _field(row, "meta", dict, location)
    problem_id, candidate_id, teacher = (_field(meta, name, str, location) for name in _IDENTITY)
    messages = tuple(_message(item, location) for item in _field(row, "messages", list, location))
    if not messages or messages[-1].role != "assistant":
        raise SelectionError(f"{location}: field 'messages' does not end with an assistant turn")
    return WeightedTrajectory(Trajectory(problem_id, candidate_id, teacher, messages, location), weight)


def _message(item: object, location: str) -> Message:
    role = _field(item, "role", str, location)
    if role not in ROLES:
        raise SelectionError(f"{location}: field 'role' is {role!r}, expected one of {', '.join(ROLES)}")
    return Message(role, _field(item, "content", str, location))


def _field(row: object, name: str, expected: type, location: str) -> Any:
    if not isinstance(row, Mapping) or not isinstance(row.get(name), expected):
        found = row.get(name) if isinstance(row, Mapping) else row
        raise SelectionError(f"{location}: field {name!r}: expected {expected.__name__}, got {found!r:.80}")
    return row[name]
