"""Errors that a user can act on. Their message is complete: what is wrong, where, and what to do.

Commands print the message of a `LarkError` on one line and exit with status 2; any other exception is a bug in
lark_jax and keeps its traceback. `StoppedBySignal` is not an error: the run did what it was asked to do.
"""

import signal


def one_line(error: BaseException) -> str:
    """The text of another library's error, for one of our messages."""
    return " ".join(str(error).split()) or type(error).__name__


class LarkError(Exception):
    """Base of all errors that input, configuration or hardware can cause."""


class ConfigError(LarkError):
    """A configuration field is unknown, of the wrong type, or outside its allowed values."""


class PoolError(LarkError):
    """A pool file or a record of it breaks the schema; names file, line, field and record id."""


class TemplateError(LarkError):
    """A chat template or a message cannot be turned into tokens faithfully."""


class CheckpointError(LarkError):
    """A student checkpoint is incomplete, unsupported, or does not match its config.json."""


class SelectionError(LarkError):
    """A score table cannot be selected from."""


class TrainingError(LarkError):
    """Fine-tuning cannot start or continue (non-finite loss or gradient, nothing to train on, changed data)."""


class EvaluationError(LarkError):
    """A benchmark, an engine or a grader cannot be used."""


class JudgeError(LarkError):
    """A judge's rubric, engine or file of answers cannot be used."""


class PipelineError(LarkError):
    """A stage's inputs are missing or its outputs belong to another experiment."""


class PreflightError(LarkError):
    """A step cannot be compiled ahead of time: no compiler for the hardware, or it refuses the program."""


class StoppedBySignal(Exception):
    """A signal asked the run to end, and it did, after saving everything that it had computed."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(f"{signal.Signals(signal_number).name}: {message}")
        self.exit_status = 128 + signal_number  # as shells report it: 143 for SIGTERM, 130 for SIGINT
