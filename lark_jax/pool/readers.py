"""From pool files to a validated Pool, record by record; texts go to disk, so memory holds only ids and locations."""

import hashlib
from pathlib import Path

from lark_jax.config import PoolConfig
from lark_jax.errors import PoolError, one_line
from lark_jax.pool.columns import normaliser
from lark_jax.pool.json_records import Advance, Located
from lark_jax.pool.records import DuplicateAnswer, Pool, SkippedRecord, Trajectory
from lark_jax.pool.schema import RecordError, parse_record
from lark_jax.pool.sources import ItemCount, Source, SourceFile, find_source, local_source, missing_files, missing_items
from lark_jax.pool.store import TrajectoryWriter, prompt_digest


def read_pool(source: str | Path, on_bad_record: str = "error") -> Pool:
    """Reads and validates a candidate pool.

    Args:
      source: a .jsonl file (UTF-8, one object per line), a .json file (a list of objects), a .parquet or .arrow file
        (one row per record), a folder of such files, or the hub id of a dataset. In a folder of .json lists each file
        is one rollout of one teacher, and item n of every file answers problem n.
      on_bad_record: "error" stops at the first bad record; "skip" leaves it out and lists it in `Pool.skipped`.
        If two records contradict each other (same ids, or one problem with two prompts), the later one is bad.

    Returns:
      The pool in file order, message text as in the file. Locations read "file:line", "file:line: item N" in lists, or
      "file:row N"; lines and rows from 1, items from 0.

    Raises:
      PoolError: the source cannot be read, has no valid record, or (with "error") has a bad one.
      ConfigError: `on_bad_record` is something else.
    """
    config = PoolConfig(path=str(source), on_bad_record=on_bad_record)
    return _read(local_source(source), config, lambda _: None)


def load_pool(config: PoolConfig, advance: Advance = lambda _: None) -> Pool:
    """`read_pool` with all settings of a configuration; `advance` is called with the bytes read."""
    return _read(local_source(config.path), config, advance)


def files_read(config: PoolConfig) -> tuple[Path, ...]:
    """The files from which `load_pool` reads records, in order."""
    return tuple(file.path for file in find_source(local_source(config.path), config).files)


def source_size(config: PoolConfig) -> int:
    """Bytes that `load_pool` will read, for a progress bar."""
    return find_source(local_source(config.path), config).size


def _read(path: Path, config: PoolConfig, advance: Advance) -> Pool:
    collector = _Collector(config)
    try:
        source = find_source(path, config)
        for file in source.files:
            collector.read(file, advance)
    except OSError as error:
        raise PoolError(f"{path}: cannot be read: {one_line(error)}; check the file and its permissions") from error
    for missing in (*collector.missing_items(source), *missing_files(source)):
        collector.refuse(missing, skipping="goes on without")
    return collector.pool(path, source)


class _Collector:
    """Checks records one after the other and keeps the good ones."""

    def __init__(self, config: PoolConfig) -> None:
        self._config = config
        self._normalise = normaliser(config.columns)
        self._locations: dict[tuple[str, str], str] = {}  # by ids
        self._first_prompts: dict[str, tuple[bytes, str]] = {}  # problem -> digest and location
        self._first_answers: dict[tuple[str, bytes], str] = {}  # problem and digest -> location
        self._writer = TrajectoryWriter()
        self._num_kept = 0
        self._skipped: list[SkippedRecord] = []
        self._filtered: list[SkippedRecord] = []
        self._duplicates: list[DuplicateAnswer] = []
        self._items: dict[Path, ItemCount] = {}  # of aligned files
        self._problems_are_named = False

    def read(self, file: SourceFile, advance: Advance) -> None:
        constant = {} if self._config.teacher is None else {"teacher": self._config.teacher}
        for located in file.records(self._config, advance):
            defaults = {**constant, **file.defaults}
            if file.is_aligned:
                defaults["problem_id"] = str(located.index)
                self._count(file, located)
            try:
                if isinstance(located.record, RecordError):
                    raise located.record
                record = self._normalise(located.record, located.location, defaults)
                self._take(parse_record(record, located.location))
            except RecordError as error:
                self.refuse(error)

    def _count(self, file: SourceFile, located: Located) -> None:
        found = located.index + 1
        is_sound = not isinstance(located.record, RecordError)
        before = self._items.get(file.path, ItemCount(0, 0))
        self._items[file.path] = ItemCount(found, found if is_sound else before.sound)
        column = self._config.columns.problem_id or "problem_id"
        if isinstance(located.record, dict) and located.record.get(column) is not None:
            self._problems_are_named = True

    def missing_items(self, source: Source) -> list[RecordError]:
        """Aligned files that lack items; if items name their problems, files may have different numbers of them."""
        return [] if self._problems_are_named else list(missing_items(source, self._items))

    def refuse(self, error: RecordError, skipping: str = "leaves such records out") -> None:
        """Raises the error, or lists it and goes on; `skipping` completes the message."""
        if self._config.on_bad_record == "error":
            raise PoolError(f'{error} (pool.on_bad_record="skip" {skipping})') from None
        self._skipped.append(error.as_skipped())

    def pool(self, path: Path, source: Source) -> Pool:
        if not self._num_kept:
            left_out = self._skipped or self._filtered
            kind = "bad ones" if self._skipped else "left out"
            first = f"; the first of {len(left_out)} {kind}: {left_out[0].reason}" if left_out else ""
            raise PoolError(f"{path}: the pool has no valid record{first}; check pool.path")
        return Pool(
            self._writer.finish(), tuple(self._skipped), tuple(self._filtered), tuple(self._duplicates), source.left_out
        )

    def _take(self, trajectory: Trajectory) -> None:
        ids = (trajectory.problem_id, trajectory.candidate_id)
        if self._config.only_correct and trajectory.correct is not True:
            if trajectory.correct is None:
                reason = "field correct: missing; config.pool.only_correct needs it in every record"
                raise RecordError(reason, trajectory.location, *ids)
            reason = "field correct: false; config.pool.only_correct leaves it out"
            self._filtered.append(SkippedRecord(*ids, trajectory.location, reason))
            return
        digest = prompt_digest(trajectory.prompt)
        self._check_consistency(trajectory, digest)
        duplicate = self._duplicate(trajectory)
        if duplicate is not None:
            if self._config.duplicate_answers == "error":
                reason = f'{_repeats(duplicate)}; config.pool.duplicate_answers="skip" leaves it out'
                raise PoolError(str(RecordError(reason, trajectory.location, *ids)))
            self._duplicates.append(duplicate)
            if self._config.duplicate_answers == "skip":
                self._filtered.append(SkippedRecord(*ids, trajectory.location, _repeats(duplicate)))
                return
        self._writer.add(trajectory, digest)
        self._num_kept += 1

    def _check_consistency(self, trajectory: Trajectory, prompt: bytes) -> None:
        """Refuses a record that contradicts an earlier one."""
        ids = (trajectory.problem_id, trajectory.candidate_id)
        if ids in self._locations:
            reason = (
                f"field candidate_id: these ids are taken by {self._locations[ids]} (ids are compared as text); "
                "give every candidate of a problem its own"
            )
            raise RecordError(reason, trajectory.location, *ids)
        here = (prompt, trajectory.location)
        first_prompt, first_location = self._first_prompts.setdefault(trajectory.problem_id, here)
        if prompt != first_prompt:
            reason = (
                f"field messages: the prompt differs from that of the same problem at {first_location}; "
                "candidates of one problem must share system and user turns"
            )
            raise RecordError(reason, trajectory.location, *ids)
        self._locations[ids] = trajectory.location

    def _duplicate(self, trajectory: Trajectory) -> DuplicateAnswer | None:
        """The record, if its answer has exactly the text of an earlier one to the same problem."""
        text = hashlib.blake2b(trajectory.response.encode(), digest_size=16).digest()
        earlier = self._first_answers.setdefault((trajectory.problem_id, text), trajectory.location)
        if earlier == trajectory.location:
            return None
        return DuplicateAnswer(trajectory.problem_id, trajectory.candidate_id, trajectory.location, earlier)


def _repeats(duplicate: DuplicateAnswer) -> str:
    return f"the answer is word for word that of {duplicate.earlier}"
