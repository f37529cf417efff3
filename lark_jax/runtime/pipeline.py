"""Stages as resumable tasks: each writes into its own folder and closes with a manifest.

A task is skipped if its manifest matches its inputs and its outputs exist. While it runs, the folder holds
`started.json` with its inputs, so that a restarted run recognises its own files and continues; files of other inputs
are removed first, and the inputs that changed are named.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lark_jax.errors import PipelineError
from lark_jax.runtime import environment, files, processes, terminal

MANIFEST = "manifest.json"
STARTED = "started.json"
FORMAT = 2  # of everything that tasks write; incremented when any of it changes, so that old results are computed again
SECONDS_TO_BE_SEEN = 60  # NFS caches a folder's listing for up to a minute


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished task records in its manifest."""

    counts: Mapping[str, int]
    skipped: Sequence[Mapping[str, Any]] = ()  # every record left out, with its reason
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """One resumable unit of work.

    `inputs` is called when the tasks before it are done; its value (JSON) is everything that the outputs depend on.
    `run` writes below `directory` and must continue from what an interrupted call with equal inputs left there.
    """

    name: str  # "score", "finetune/lark_B3", ...
    directory: Path
    inputs: Callable[[], Mapping[str, Any]]
    run: Callable[[Path], Outcome]
    scratch: tuple[str, ...] = ()  # folders inside that may be deleted once it is finished; until then they save work
    everywhere: bool = False  # all processes of the run execute it; else only the first
    environment: tuple[str, ...] = ()  # inputs that describe what is installed; later stages ignore them
    # Inputs that earlier releases did not record, with the value that they had then: their results stay valid.
    unrecorded: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stage(self) -> str:
        return self.name.partition("/")[0]

    def with_unrecorded(self, found: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs `found` in a folder, with those that were not recorded then and that the task has `now`."""
        return {**{key: value for key, value in self.unrecorded.items() if key in now}, **found}


@dataclasses.dataclass(frozen=True)
class Manifest:
    name: str
    fingerprint: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, int]  # relative path -> bytes
    outcome: Outcome
    versions: Mapping[str, str]
    hardware: str


def run_tasks(tasks: Sequence[Task]) -> int:
    """Runs what is not up to date, in order; returns how many tasks had to run.

    Called in every process with the same tasks. The first one decides what runs, prepares the folders and writes the
    manifests; the others only run the tasks marked `everywhere`.
    """
    return sum([_run_if_needed(task) for task in tasks])


def _run_if_needed(task: Task) -> bool:
    inputs = _as_json(task.inputs()) if processes.is_first() else {}
    runs = processes.decided_by_first(task.name, lambda: _needs_to_run(task, inputs))
    if runs and task.everywhere:
        _require_shared(task)
        processes.barrier(f"{task.name}: all see its folder")
    if runs and (task.everywhere or processes.is_first()):
        outcome = task.run(task.directory)
        if processes.is_first():
            _write_manifest(task, inputs, outcome)
            terminal.say(f"{task.name}: done" + _describe(outcome))
    return runs


def _needs_to_run(task: Task, inputs: Mapping[str, Any]) -> bool:
    """Whether the task has to run; prints it, and prepares the folder if so."""
    existing = read_manifest(task.directory)
    before = None if existing is None else task.with_unrecorded(existing.inputs, inputs)
    if existing is not None and before == inputs and _outputs_present(existing, task.directory):
        terminal.say(f"{task.name}: up to date")
        return False
    _prepare_directory(task, inputs, before)
    terminal.say(f"{task.name}: running")
    return True


def _require_shared(task: Task) -> None:
    """Waits until the first process's record is visible here: network file systems may take a while."""
    deadline = time.monotonic() + SECONDS_TO_BE_SEEN
    while not (task.directory / STARTED).is_file():
        if time.monotonic() > deadline:
            raise PipelineError(
                f"{task.directory}: process {processes.label()} does not see what the first process wrote there; "
                "config.workdir has to be a folder that all hosts share"
            )
        time.sleep(0.5)


def require_current(task: Task) -> None:
    """Refuses to build on a task that finished with other inputs; tasks that never ran are ignored.

    The PipelineError names the inputs that changed and the stage to add.
    """
    existing = read_manifest(task.directory)
    if existing is None:
        return
    inputs = _as_json(task.inputs())
    found, now = (
        {key: value for key, value in values.items() if key not in task.environment}
        for values in (task.with_unrecorded(existing.inputs, inputs), inputs)
    )
    changed = ", ".join(_changed_keys(found, now))
    if changed:
        raise PipelineError(
            f"{task.directory}: {changed} changed since this was computed; add {task.stage!r} to config.stages, or "
            "choose another config.workdir"
        )


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a finished task, or None."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        values = files.read_json(path)
        return Manifest(**{**values, "outcome": Outcome(**values["outcome"])})
    except (ValueError, TypeError, KeyError) as error:
        raise PipelineError(f"{path}: not a manifest ({error}); delete {directory} to compute it again") from error


def require_manifest(directory: Path, stage: str) -> Manifest:
    """The manifest of a stage; raises PipelineError, which names the stage to add, if it has not finished."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise PipelineError(f"{directory}: nothing finished here yet; add {stage!r} to config.stages")
    return manifest


def _as_json(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs as a manifest returns them (tuples become lists), so that old and new compare equal."""
    return json.loads(json.dumps({**inputs, "format": FORMAT}))


def _outputs_present(manifest: Manifest, directory: Path) -> bool:
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == size
        for name, size in manifest.outputs.items()
    )


def _prepare_directory(task: Task, inputs: Mapping[str, Any], finished: Mapping[str, Any] | None) -> None:
    """Leaves the task's folder either empty or with what an earlier call with the same inputs wrote.

    If outputs of a finished task were lost, a task with scratch keeps the rest, which may be hours of work, and
    continues as after an interruption; other tasks start with an empty folder.

    Args:
      finished: inputs of the finished result in the folder, if there is one.
    """
    started = _started_inputs(task.directory)
    started = None if started is None else task.with_unrecorded(started, inputs)
    before = finished if finished is not None else started
    if before is None and task.directory.exists() and any(task.directory.iterdir()):
        raise PipelineError(
            f"{task.directory}: contains files that lark_jax did not write; move them away, or choose another "
            "config.workdir"
        )
    if finished == inputs:
        terminal.say(f"{task.name}: outputs are missing or have another size; computing them again")
    elif before is not None and before != inputs:
        terminal.say(f"{task.name}: {', '.join(_changed_keys(before, inputs))} changed; starting over")
    kept = started == inputs or (before == inputs and bool(task.scratch))
    if not kept and task.directory.exists():
        files.remove_directory(task.directory)
    files.remove_partial_files(task.directory)
    files.write_json(task.directory / STARTED, {"inputs": inputs})
    (task.directory / MANIFEST).unlink(missing_ok=True)


def _started_inputs(directory: Path) -> Mapping[str, Any] | None:
    path = directory / STARTED
    try:
        return files.read_json(path)["inputs"] if path.is_file() else None
    except (ValueError, TypeError, KeyError) as error:
        raise PipelineError(f"{path}: not readable ({error}); delete {directory} to compute it again") from error


def _changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the leaves in which two nested mappings differ."""
    changed: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += _changed_keys(before, after, prefix=f"{prefix}{key}.")
        elif before != after:
            changed.append(prefix + key)
    return changed


def _write_manifest(task: Task, inputs: Mapping[str, Any], outcome: Outcome) -> None:
    present = sorted(file for file in task.directory.rglob("*") if file.is_file())
    outputs = {
        file.relative_to(task.directory).as_posix(): file.stat().st_size
        for file in present
        if file.name not in (MANIFEST, STARTED) and file.relative_to(task.directory).parts[0] not in task.scratch
    }
    manifest = Manifest(
        name=task.name,
        fingerprint=files.sha256_of_json(inputs),
        inputs=inputs,
        outputs=outputs,
        outcome=outcome,
        versions=environment.package_versions(),
        hardware=environment.hardware(),
    )
    files.write_json(task.directory / MANIFEST, dataclasses.asdict(manifest))
    (task.directory / STARTED).unlink(missing_ok=True)


def _describe(outcome: Outcome) -> str:
    counts = [f"{value:,} {name}" for name, value in outcome.counts.items() if value]
    skipped = [f"{len(outcome.skipped):,} skipped, see {MANIFEST}"] if outcome.skipped else []
    return f" ({', '.join(counts + skipped)})" if counts or skipped else ""
