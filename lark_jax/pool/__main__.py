"""Entry point: `python -m lark_jax.pool PATH` or `python -m lark_jax.pool --config=configs/NAME.py`.

Says what a pool holds and what of it would be left out and why. Needs no accelerator.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from lark_jax.config import PoolConfig, StudentConfig, pool_from_mapping, student_from_mapping
from lark_jax.errors import ConfigError, LarkError
from lark_jax.pool.readers import load_pool, source_size
from lark_jax.pool.summary import PoolSummary, as_json, as_text, summarise
from lark_jax.recipe import paper_recipe
from lark_jax.rendering.chat import load_chat_format
from lark_jax.rendering.token_counts import summarise_tokens
from lark_jax.runtime import files, terminal

EXIT_BAD_RECORDS = 1
EXIT_USER_ERROR = 2
SECONDS_WITHOUT_A_BAR = 10.0


def main(arguments: Sequence[str]) -> int:
    """Prints the summary; returns the exit status: 0 where a run would read this pool to its end."""
    options, others = _parser().parse_known_args(arguments)
    try:
        values = config_values(others, options.path)
        config = pool_from_mapping(values)
        summary = look_at(config, _student(values, options.student))
        if options.out is not None:
            files.write_json(options.out, as_json(summary))
    except (LarkError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(as_text(summary))
    stops = what_stops_a_run(config, summary)
    if stops:
        print(f"\nA run would stop at the first of these: {stops}")
    return EXIT_BAD_RECORDS if stops else 0


def look_at(config: PoolConfig, student: StudentConfig | None) -> PoolSummary:
    """Reads the pool, past bad records, and with a student's folder tokenizes it."""
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


def _student(values: dict[str, Any], folder: str | None) -> StudentConfig | None:
    """The student of the configuration with the tokenizer of `folder`; None: tokens are not counted."""
    if folder is None:
        return None
    return student_from_mapping({"student": {**values.get("student", {}), "path": folder}})


def what_stops_a_run(config: PoolConfig, summary: PoolSummary) -> str:
    """Which records the configuration does not let pass; empty where there are none."""
    found = []
    if config.on_bad_record == "error" and summary.skipped:
        found.append('the bad records (config.pool.on_bad_record="skip" leaves them out)')
    if config.duplicate_answers == "error" and summary.duplicates:
        found.append('the repeated answers (config.pool.duplicate_answers="skip" leaves them out)')
    return "; ".join(found)


def config_values(arguments: Sequence[str], path: str | None) -> dict[str, Any]:
    """The configuration as nested dictionaries: that of --config=FILE, else the recipe's, with all overrides.

    Raises:
      ConfigError: there is neither a pool nor a configuration file, or the file or an override is wrong.
    """
    own_flags = flags.FlagValues()  # not the process's: other entry points define a flag of this name
    command = ["lark_jax.pool", *arguments]
    has_file = any(argument.lstrip("-").startswith("config=") for argument in arguments)
    if path is None and not has_file:
        raise ConfigError("which pool? give PATH or --config=FILE")
    try:
        if has_file:
            config_flags.DEFINE_config_file("config", None, "", own_flags, sys_argv=command)
        else:
            config_flags.DEFINE_config_dict("config", paper_recipe(), "", own_flags, sys_argv=command)
        rest = own_flags(command)[1:]
        values: dict[str, Any] = own_flags["config"].value.to_dict()  # type: ignore[union-attr]
    except Exception as error:  # whatever a config file raises, it is the user's own code
        raise ConfigError(f"--config: {type(error).__name__}: {error}") from error
    if rest:
        raise ConfigError(f"unexpected arguments: {' '.join(rest)}")
    if path is not None:
        values.setdefault("pool", {})["path"] = path
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lark_jax.pool",
        description="What a pool holds, and what of it would be left out and why.",
        epilog="Further options: --config=FILE and --config.pool.FIELD=VALUE, as for python -m lark_jax.run.",
        allow_abbrev=False,
    )
    parser.add_argument("path", nargs="?", help="file, folder or hub id, in place of config.pool.path")
    parser.add_argument("--student", help="folder with tokenizer files: count tokens too")
    parser.add_argument("--out", help="JSON file for all of it, every record listed")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
