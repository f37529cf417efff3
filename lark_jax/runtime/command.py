"""What every `python -m lark_jax.NAME` has in common: flags, configuration, `--help`, errors and exit statuses.

An error that the user can fix is one line on stderr and status 2; any other exception is a bug and keeps its traceback.
"""

import contextlib
import dataclasses
import faulthandler
import itertools
import os
import re
import select
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import flags as absl_flags
from absl import logging
from ml_collections import config_flags

from lark_jax.config import expand_home, require_known_field, split_commas, type_of_field
from lark_jax.config.reference import as_text
from lark_jax.errors import ConfigError, LarkError, StoppedBySignal, one_line
from lark_jax.recipe import paper_recipe
from lark_jax.runtime import processes, terminal

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as shells report SIGPIPE

HELP = ("--help", "-help", "-h")
WIDTH = 110


@dataclasses.dataclass(frozen=True)
class Flag:
    """`--name=VALUE`; a float default makes it a number."""

    name: str
    doc: str
    default: str | float | None = None
    required: bool = False
    choices: tuple[str, ...] = ()
    path: bool = False  # a leading `~` is the home folder


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line."""

    raw: tuple[str, ...]
    flags: Mapping[str, Any]
    positional: tuple[str, ...]
    config: dict[str, Any]  # nested values, overrides applied; empty for commands without a configuration


@dataclasses.dataclass(frozen=True)
class Command:
    """One entry point: what it accepts, and the action that gets it and returns the exit status."""

    name: str  # "lark_jax.audit"
    usage: str  # the arguments, as in README
    doc: str
    action: Callable[[Arguments], int]
    flags: tuple[Flag, ...] = ()
    positional: bool = False
    config: tuple[str, ...] | None = None  # sections that the command reads, () for all; None: no configuration
    config_required: bool = False  # else a missing --config means the paper's recipe

    def main(self, arguments: Sequence[str]) -> int:
        """Parses and acts; returns the exit status."""
        if set(HELP) & set(arguments):
            return guarded(lambda: print(self.help()) or 0)
        return guarded(lambda: self.action(self.parse(arguments)))

    def start(self) -> NoReturn:
        """`main` with this process's arguments and libraries that only warn."""
        faulthandler.enable()
        absl_flags.FLAGS.mark_as_parsed()  # else its first message would be a warning about this
        logging.use_absl_handler()
        logging.set_verbosity(logging.WARNING)
        sys.exit(self.main(sys.argv[1:]))

    def parse(self, arguments: Sequence[str]) -> Arguments:
        """The command line as values.

        Raises:
          ConfigError: a flag is unknown, missing or has no valid value, or the configuration file does not load.
        """
        # A shell does not expand the `~` of --config=~/FILE.
        arguments = [expand_home(a) if a.lstrip("-").startswith("config=") else a for a in arguments]
        argv = [self.name, *(_lists_as_flags(arguments) if self.config is not None else arguments)]
        config_file = _value_after("config", arguments)
        try:
            parser = self._parser(argv, config_file)
            positional = parser(argv)[1:]
            values = _nested(parser["config"].value) if self.config is not None else {}
        except absl_flags.Error as error:
            raise ConfigError(_explain_flag_error(error) or f"{one_line(error)}; {self._see_help}") from error
        except LarkError:
            raise
        except Exception as error:  # whatever a config file raises: it is the user's own code
            where = f"--config={config_file}" if config_file else "--config"
            for override in _overrides(arguments):
                section, dot, _ = override.partition(".")
                if dot and isinstance(error, KeyError) and str(error).strip("\"'") == section:
                    raise ConfigError(f"config.{override}: --config={config_file} has no section {section}") from error
            raise ConfigError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
        if positional and not self.positional:
            raise ConfigError(f"unexpected arguments: {' '.join(positional)}; {self._see_help}")
        found: dict[str, Any] = {flag.name: parser[flag.name].value for flag in self.flags}
        for flag in self.flags:
            if flag.path and found[flag.name] is not None:
                found[flag.name] = expand_home(found[flag.name])
            if flag.required and not found[flag.name]:
                raise ConfigError(f"--{flag.name}: missing; usage: {self._command_line}")
            if flag.path and found[flag.name] == "":
                raise ConfigError(f"--{flag.name}=: expected a path, got an empty one")
        return Arguments(tuple(arguments), found, tuple(positional), values)

    def help(self) -> str:
        """Usage, flags, and the fields of the configuration."""
        parts = [f"usage: {self._command_line}", textwrap.fill(self.doc, WIDTH)]
        flag_lines = [line for flag in self.flags for line in _described(flag)]
        if self.config is not None:
            needed = "" if self.config_required else "; default: the paper's recipe"
            flag_lines += [f"  --config=FILE\n      Python file with get_config(), see configs/{needed}."]
            flag_lines += ["  --config.FIELD=VALUE\n      Replaces a field of the configuration; a tuple is a,b,c."]
        if flag_lines:
            parts.append("\n".join(["flags:", *flag_lines]))
        if self.config is not None:
            parts.append(f"fields of the configuration, with their defaults:\n{as_text(self.config, WIDTH)}")
        return "\n\n".join(parts)

    @property
    def _command_line(self) -> str:
        return f"python -m {self.name} {self.usage}"

    @property
    def _see_help(self) -> str:
        return f"python -m {self.name} --help lists what can be given"

    def _parser(self, argv: list[str], config_file: str | None) -> absl_flags.FlagValues:
        parser = absl_flags.FlagValues()  # not absl's global one: each command has its own flags
        parser.set_gnu_getopt(True)  # flags may follow positional arguments
        for flag in self.flags:
            _define(flag, parser)
        if self.config is None:
            return parser
        for override in _overrides(argv):
            require_known_field(override)
        if config_file is not None:
            if not os.path.isfile(config_file.partition(":")[0]):  # what follows the colon goes to get_config
                raise ConfigError(f"--config={config_file}: no such file")
            config_flags.DEFINE_config_file("config", None, "", parser, sys_argv=argv)
        elif self.config_required:
            raise ConfigError(f"--config: missing, a file such as configs/tiny.py; usage: {self._command_line}")
        else:
            config_flags.DEFINE_config_dict("config", paper_recipe(), "", parser, sys_argv=argv)
        return parser


def guarded(action: Callable[[], int]) -> int:
    """The exit status of `action`, whatever it raises that is not a bug; the message has then been printed."""
    try:
        status = action()
        sys.stdout.flush()
        return status
    except StoppedBySignal as stopped:
        terminal.say(str(stopped))
        return stopped.exit_status
    except BrokenPipeError as error:
        if not _reader_is_gone():
            return fail(str(error))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end
        return EXIT_BROKEN_PIPE
    except (LarkError, OSError) as error:
        return fail(str(error))
    except jax.errors.JaxRuntimeError as error:
        return fail(_explain_device_error(str(error)))
    except KeyboardInterrupt:
        if processes.announce_failure("interrupted"):
            print("interrupted; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED


def fail(message: str) -> int:
    """Prints what is wrong, unless another process has printed the same; returns the exit status."""
    line = " ".join(message.split())
    if processes.announce_failure(line):
        print(f"error: {line}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _explain_device_error(message: str) -> str:
    if "RESOURCE_EXHAUSTED" in message:
        return (
            "the device is out of memory; lower config.finetune.tokens_per_batch (finished steps are kept) or "
            "config.score.tokens_per_batch (other batches: scores of this stage are computed again; finished stages "
            f"are kept): {message[:300]}"
        )
    return f"the device failed: {message[:500]}"


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe without a reader, as in `... | head`; else another pipe broke."""
    with contextlib.suppress(OSError, ValueError):  # stdout is no file
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _define(flag: Flag, parser: absl_flags.FlagValues) -> None:
    if isinstance(flag.default, float):
        absl_flags.DEFINE_float(flag.name, flag.default, flag.doc, flag_values=parser)
    elif flag.choices:
        absl_flags.DEFINE_enum(flag.name, flag.default, flag.choices, flag.doc, flag_values=parser)
    else:
        absl_flags.DEFINE_string(flag.name, flag.default, flag.doc, flag_values=parser)


def _described(flag: Flag) -> list[str]:
    default = "" if flag.default in (None, "") else f" (default: {flag.default})"
    choices = f" One of {', '.join(flag.choices)}." if flag.choices else ""
    text = f"{flag.doc}{choices}{' (required)' if flag.required else default}"
    return [f"  --{flag.name}=VALUE", *textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _value_after(name: str, arguments: Sequence[str]) -> str | None:
    """The value of the last `--name=VALUE` or `--name VALUE`."""
    found = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            found = value if equals else following
    return found


def _lists_as_flags(arguments: Sequence[str]) -> Iterator[str]:
    """`--config.FIELD=a,b` of a field with texts as one flag per item: ml_collections reads a list as Python."""
    waiting = ""  # a flag whose value is the next argument
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if waiting:
            flag, equals, value, waiting = waiting, "=", argument, ""
        elif _takes_texts(flag) and not equals:
            waiting = flag
            continue
        if equals and _takes_texts(flag) and "," in value and not value.startswith(("(", "[")):
            yield from (f"{flag}={item}" for item in split_commas(value))
        else:
            yield f"{flag}{equals}{value}"
    if waiting:
        yield waiting


def _takes_texts(flag: str) -> bool:
    override = re.fullmatch(r"--?config\.([\w.]+)", flag)
    return override is not None and type_of_field(override[1]) == "tuple[str, ...]"


def _overrides(arguments: Sequence[str]) -> list[str]:
    """The fields that the command line replaces, as "finetune.seed"."""
    return re.findall(r"^--?(?:no)?config\.([\w.]+)", "\n".join(arguments), flags=re.MULTILINE)


def _explain_flag_error(error: absl_flags.Error) -> str | None:
    """What is wrong with a value or with the config file's own code; None: the error's own words will do."""
    text = str(error).strip()
    if "Traceback" in text:  # ml_collections repeats that of the config file
        return f"{text.partition(': ')[0].removeprefix('flag ')}: {text.splitlines()[-1].strip()}"
    wrong = re.match(r"flag --config\.(\w[\w.]*)=(.*?): ", text, flags=re.DOTALL)
    return f"config.{wrong[1]}: expected {type_of_field(wrong[1])}, got {wrong[2]!r}" if wrong else None


def _nested(config: Any) -> dict[str, Any]:
    """The configuration as nested dictionaries, references to other fields resolved."""
    if not hasattr(config, "to_dict"):  # ml_collections raises here what kept the file from being read
        raise TypeError(f"get_config() has to return a ConfigDict, got {type(config).__name__}")
    values: dict[str, Any] = config.to_dict()
    return values
