"""Writes a selection as training files, and reads them back.

`train.jsonl` and `train.parquet` have the same rows; `train_resampled.jsonl` repeats rows instead of weighting them.
`dataset_info.json` describes the files to LLaMA-Factory, and the data set card `README.md` to the `datasets` library,
which would otherwise combine every file named "train..." into one data set.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lark_jax.errors import SelectionError
from lark_jax.pool.records import ROLES, Message, Pool, Trajectory
from lark_jax.runtime.files import atomic_path, write_json, write_jsonl, write_text
from lark_jax.selection.selector import Choice, Selection

TRAIN_JSONL = "train.jsonl"
TRAIN_PARQUET = "train.parquet"
TRAIN_RESAMPLED = "train_resampled.jsonl"
DATASET_INFO = "dataset_info.json"
CARD = "README.md"

_IDENTITY = ("problem_id", "candidate_id", "teacher")
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_META = pa.struct(
    [
        *((name, pa.string()) for name in _IDENTITY),
        ("score", pa.float64()),
        ("rank", pa.int64()),  # the type that JSON readers infer
    ]
)
TRAIN_SCHEMA = pa.schema([("messages", pa.list_(_MESSAGE)), ("weight", pa.float64()), ("meta", _META)])


@dataclass(frozen=True)
class WeightedTrajectory:
    trajectory: Trajectory
    weight: float  # q_k of Eq. 1, > 0; sums to 1 over the trajectories of a problem


def write_selection(
    selection: Selection, pool: Pool, directory: str | Path, resampled: Sequence[int] | None = None
) -> None:
    """Writes the choices of positive weight, in their order, with messages exactly as in the pool.

    A row has `messages`, `weight`, and `meta` with problem_id, candidate_id, teacher, score and rank. Equal arguments
    give equal bytes. Choices of weight 0 would train nothing; only `selection.counts` includes them.

    Args:
      resampled: how often `train_resampled.jsonl`, whose rows have no `weight`, repeats each choice (see
        `resampled_counts`); None writes no such file.

    Raises:
      SelectionError: a chosen candidate is not in the pool.
    """
    directory = Path(directory)
    rows = _rows(selection, pool)
    weighted = [row for row in rows if row["weight"] > 0]
    write_jsonl(directory / TRAIN_JSONL, weighted)
    with atomic_path(directory / TRAIN_PARQUET) as temporary:
        pq.write_table(pa.Table.from_pylist(weighted, schema=TRAIN_SCHEMA), temporary)
    files = {"weighted": TRAIN_JSONL}
    if resampled is not None:
        write_jsonl(directory / TRAIN_RESAMPLED, _repeated(rows, resampled))
        files["resampled"] = TRAIN_RESAMPLED
    write_json(directory / DATASET_INFO, _dataset_info(selection.name, files))
    write_text(directory / CARD, _card(selection, files))


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


def _rows(selection: Selection, pool: Pool) -> list[dict[str, Any]]:
    trajectories = pool.by_ids()
    rows = []
    for choice in selection.choices:
        trajectory = trajectories.get((choice.problem_id, choice.candidate_id))
        if trajectory is None:
            name = f"{choice.problem_id}/{choice.candidate_id}"
            raise SelectionError(f"selection {selection.name}: the pool has no candidate {name}; score this pool again")
        rows.append(_row(choice, trajectory))
    return rows


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


def _repeated(rows: Sequence[dict[str, Any]], counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    for row, count in zip(rows, counts, strict=True):
        unweighted = {name: value for name, value in row.items() if name != "weight"}
        yield from [unweighted] * count


def _dataset_info(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    """Describes role/content messages to LLaMA-Factory, which has no weights and trains with equal ones."""
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    description = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    names = {"weighted": name, "resampled": f"{name}_resampled"}
    return {names[kind]: {"file_name": file, **description} for kind, file in files.items()}


def _card(selection: Selection, files: Mapping[str, str]) -> str:
    """A data set card that maps configurations to files, for `load_dataset(folder)` here or on the hub.

    All files are JSON lines, since the library reads every configuration of a folder in the format of the first.
    """
    configs = "".join(
        f"- config_name: {kind}\n  data_files: {file}\n  default: {json.dumps(file == TRAIN_JSONL)}\n"
        for kind, file in files.items()
    )
    return _CARD.format(name=selection.name, method=selection.method, budget=selection.budget, configs=configs)


_CARD = f"""---
configs:
{{configs}}---
# {{name}}

Trajectories that the method `{{method}}` selected for one student, at most {{budget}} per problem.

- `{TRAIN_JSONL}`, and the same rows in `{TRAIN_PARQUET}`: `messages` as in the pool, `weight` (> 0; sums to 1 over the
  rows of a problem), `meta`. A trainer that ignores `weight` trains another objective.
- `{TRAIN_RESAMPLED}`, where it was asked for: for trainers without weights. Rows have no `weight`; each is repeated in
  proportion to it, on average.
- `{DATASET_INFO}`: the same for LLaMA-Factory.
- `manifest.json`: hashes of pool, student, tokenizer, chat template and code; counts; what was left out.
"""


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
