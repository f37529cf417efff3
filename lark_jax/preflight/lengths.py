"""The lengths of a pool's rows: counted, given, or assumed; and the steps that they are planned into."""

import collections
import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from lark_jax.config import Experiment
from lark_jax.errors import ConfigError
from lark_jax.pool import files_read, load_pool
from lark_jax.pool.sources import local_source
from lark_jax.rendering import RENDERING_VERSION
from lark_jax.rendering.chat import load_chat_format
from lark_jax.rendering.token_counts import count_inputs
from lark_jax.runtime import files
from lark_jax.runtime.processes import EVERYTHING
from lark_jax.scoring.workload import plan_pool

ASSUMED_TRAJECTORIES = 165_000  # 5,000 problems x 33, the paper's pool
ASSUMED_MEAN = 6_000  # tokens; about a billion together
ASSUMED_SPREAD = 0.9  # standard deviation of the logarithm
ASSUMED_CLASSES = 64
FOLDER = "preflight"  # below the workdir
GIVEN = re.compile(r"\d+:\d+(,\d+:\d+)*")


@dataclass(frozen=True)
class Lengths:
    """The inputs of every row of a pool (prompt and target tokens minus one), and their source."""

    inputs: tuple[int, ...]
    source: str

    @property
    def longest(self) -> int:
        return max(self.inputs)

    @property
    def tokens(self) -> int:
        return sum(self.inputs)


class Steps(NamedTuple):
    """All steps of one shape."""

    rows: int  # per device
    length: int  # tokens in a row
    times: int


def find_lengths(experiment: Experiment, given: str | None) -> Lengths:
    """`given` lengths, else those of the pool if it and the tokenizer are on this machine, else assumed ones.

    Raises:
      ConfigError: `given` is not of the form length:count,length:count.
      PoolError, TemplateError, CheckpointError: the pool or the tokenizer is present but cannot be used.
    """
    longest = experiment.student.max_length - 1
    if given is not None:
        return _given(given, longest)
    if not Path(experiment.pool.path).exists():
        return _assumed(longest, f"{experiment.pool.path} is not here")
    if not (Path(experiment.student.path) / "tokenizer.json").is_file():
        return _assumed(longest, f"no tokenizer in {experiment.student.path}")
    return _counted(experiment)


def plan_steps(lengths: Lengths, tokens_per_batch: int, data_shards: int) -> tuple[Steps, ...]:
    """The steps of a pool by shape, longest rows first; rows are split over `data_shards` devices."""
    plans = plan_pool(lengths.inputs, tokens_per_batch, data_shards)
    counts = collections.Counter((plan.length, plan.rows // data_shards) for plan in plans)
    return tuple(Steps(rows, length, times) for (length, rows), times in sorted(counts.items(), reverse=True))


def _given(text: str, longest: int) -> Lengths:
    pairs = [tuple(map(int, pair.split(":"))) for pair in text.split(",")] if GIVEN.fullmatch(text) else []
    if not pairs or min(min(pair) for pair in pairs) < 1:
        raise ConfigError(f"--lengths={text}: expected length:count pairs, e.g. --lengths=8192:1000,32768:20")
    inputs = tuple(min(length, longest) for length, count in pairs for _ in range(count))
    return Lengths(inputs, f"--lengths={text}")


def _counted(experiment: Experiment) -> Lengths:
    """Counts are cached in the workdir, so a second call counts nothing."""
    pool = load_pool(experiment.pool)
    chat = load_chat_format(experiment.student.path, experiment.student.chat_template)
    max_length = experiment.student.max_length
    content = files.sha256_of_path(local_source(experiment.pool.path), files_read(experiment.pool))
    texts = files.sha256_of_json([content, experiment.pool.reading()])
    counts = files.sha256_of_json([RENDERING_VERSION, texts, chat.template_hash, chat.tokenizer_hash, max_length])
    folder = Path(experiment.workdir) / FOLDER / f"inputs-{counts[:16]}"
    counted = count_inputs(pool, chat, max_length, folder=folder, share=EVERYTHING)
    inputs = tuple(length for length in counted if isinstance(length, int))
    if not inputs:
        raise ConfigError(f"{experiment.pool.path}: no trajectory can be rendered, so there are no lengths to plan for")
    return Lengths(inputs, f"{experiment.pool.path}, tokenized")


def _assumed(longest: int, reason: str) -> Lengths:
    """A log-normal pool of the paper's size; each class has the length at its middle."""
    inputs: list[int] = []
    for number in range(ASSUMED_CLASSES):
        normal = NormalDist().inv_cdf((number + 0.5) / ASSUMED_CLASSES)
        length = ASSUMED_MEAN * math.exp(ASSUMED_SPREAD * normal - ASSUMED_SPREAD**2 / 2)
        before, after = (ASSUMED_TRAJECTORIES * edge // ASSUMED_CLASSES for edge in (number, number + 1))
        inputs += [min(longest, round(length))] * (after - before)
    return Lengths(
        tuple(inputs),
        f"assumed, since {reason}: {ASSUMED_TRAJECTORIES:,} trajectories of about {ASSUMED_MEAN:,} tokens "
        f"(log-normal, spread {ASSUMED_SPREAD}), as in the paper; give --lengths=LENGTH:COUNT,...",
    )
