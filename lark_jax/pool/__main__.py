"""Entry point: `python -m lark_jax.pool PATH` or `python -m lark_jax.pool --config=configs/NAME.py`.

Prints what a pool holds, and which records a run would leave out and why. Needs no accelerator.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lark_jax.config import PoolConfig, StudentConfig, section_of
from lark_jax.errors import ConfigError
from lark_jax.pool.readers import load_pool, source_size
from lark_jax.pool.summary import PoolSummary, as_text, summarise
from lark_jax.rendering.chat import load_chat_format
from lark_jax.rendering.token_counts import summarise_tokens
from lark_jax.runtime import files, terminal
from lark_jax.runtime.command import Arguments, Command, Flag

EXIT_BAD_RECORDS = 1
SECONDS_WITHOUT_A_BAR = 10.0


def show(arguments: Arguments) -> int:
    """Prints the summary; returns the exit status: 0 if a run would read this pool to its end."""
    values = arguments.config
    if arguments.positional:
        if len(arguments.positional) > 1:
            raise ConfigError(f"one pool at a time, got {', '.join(arguments.positional)}")
        values.setdefault("pool", {})["path"] = arguments.positional[0]
    elif not values.get("pool", {}).get("path"):
        raise ConfigError("which pool? give PATH or --config=FILE")
    config = section_of(PoolConfig, values)
    student, folder = None, arguments.flags["student"] or _students_folder(values)
    if folder is not None:
        student = section_of(StudentConfig, {"student": {**values.get("student", {}), "path": folder}})
    summary = look_at(config, student)
    if arguments.flags["out"] is not None:
        files.write_json(arguments.flags["out"], dataclasses.asdict(summary))
    print(as_text(summary))
    stops = what_stops_a_run(config, summary)
    if stops:
        print(f"\nA run would stop at the first of these: {stops}")
    return EXIT_BAD_RECORDS if stops else 0


def _students_folder(values: Mapping[str, Any]) -> str | None:
    """config.student.path, if it is a folder here: this command downloads no student."""
    folder: str = values.get("student", {}).get("path", "")
    if not folder or Path(folder).is_dir():
        return folder or None
    terminal.say(f"{folder}: config.student.path is no folder here, so tokens are not counted; see --student")
    return None


def look_at(config: PoolConfig, student: StudentConfig | None) -> PoolSummary:
    """Reads the pool, skipping bad records; with a student, counts its tokens."""
    lenient = dataclasses.replace(
        config,
        on_bad_record="skip",
        duplicate_answers="keep" if config.duplicate_answers == "error" else config.duplicate_answers,
    )
    delay = SECONDS_WITHOUT_A_BAR
    with terminal.progress_bar(what="read", total=source_size(lenient), unit="B", delay=delay) as bar:
        pool = load_pool(lenient, bar.update)
    total = len(pool.trajectories)
    with terminal.progress_bar(what="measure", total=total, unit="trajectory", delay=delay) as bar:
        summary = summarise(pool, bar.update)
    if student is None:
        return summary
    chat = load_chat_format(student.path, student.chat_template)
    with terminal.progress_bar(what="count tokens", total=total, unit="trajectory", delay=delay) as bar:
        tokens = summarise_tokens(pool, chat, student.path, student.max_length, bar.update)
    return dataclasses.replace(summary, tokens=tokens)


def what_stops_a_run(config: PoolConfig, summary: PoolSummary) -> str:
    """Which records the configuration refuses; empty if there are none."""
    found = []
    if config.on_bad_record == "error" and summary.skipped:
        found.append('the bad records (config.pool.on_bad_record="skip" leaves them out)')
    if config.duplicate_answers == "error" and summary.duplicates:
        found.append('the repeated answers (config.pool.duplicate_answers="skip" leaves them out)')
    if summary.tokens is not None and len(summary.tokens.refused) == summary.trajectories:
        found.append("no trajectory can be scored by this student")
    return "; ".join(found)


COMMAND = Command(
    name="lark_jax.pool",
    usage="[PATH] [--config=FILE] [--config.pool.FIELD=VALUE ...] [--student=FOLDER] [--out=FILE.json]",
    doc="Prints what a pool holds, and which records a run would leave out and why. PATH (a file, folder or hub id) "
    "replaces config.pool.path.",
    action=show,
    flags=(
        Flag("student", "Folder with tokenizer files: count tokens too. Default: config.student.path.", path=True),
        Flag("out", "JSON file for all of it, every record listed.", path=True),
    ),
    positional=True,
    config=("pool", "student"),
)
main = COMMAND.main

if __name__ == "__main__":
    COMMAND.start()
