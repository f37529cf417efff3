"""Local Naturalness of every trajectory: the log-likelihoods of its steps, as a pass over the pool."""

from collections.abc import Hashable
from dataclasses import dataclass

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from lark_jax.errors import PipelineError
from lark_jax.rendering.chat import Prompts
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.scoring.local_naturalness.cost import load_of_batch, load_of_part
from lark_jax.scoring.local_naturalness.programs import WindowPrograms
from lark_jax.scoring.local_naturalness.windows import WindowBatch
from lark_jax.scoring.local_naturalness.work import SCHEMA, Work, render_part
from lark_jax.scoring.pool_pass import PoolPass, run_pass
from lark_jax.scoring.throughput import Load, Throughput
from lark_jax.students.decoder import Decoder
from lark_jax.students.prefixes import Prefixes


@dataclass(frozen=True)
class PromptWindows:
    """A batch of windows and the prompts of its part; see `pool_pass.Batch`."""

    prompts_ns: np.ndarray
    windows: WindowBatch
    load: Load

    @property
    def shape(self) -> Hashable:
        return self.prompts_ns.shape, self.windows.tokens_bt.shape, self.windows.wanted_s.shape


def score_local_naturalness(
    student: Decoder, work: Work, *, mesh: Mesh, share: Share = EVERYTHING, writes: bool = True
) -> Throughput:
    """Computes what is not finished yet of a worker's share of the parts; see `run_pass`.

    Raises:
      ConfigError: the mesh does not fit the student.
    """
    options, architecture = work.options, student.architecture
    programs = WindowPrograms(student, mesh, options.vocab_chunk)
    prompts: Prompts = {}

    def render(number: int) -> list[PromptWindows]:
        part = render_part(work, work.parts[number], prompts)
        return [PromptWindows(part.prompts_ns, batch, load_of_batch(architecture, batch)) for batch in part.batches]

    return run_pass(
        PoolPass(
            what="local naturalness",
            unit="steps",
            streams=work.streams,
            loads=[load_of_part(architecture, work, part) for part in work.parts],
            render=render,
            step=WindowStep(programs),
            encode=sums_of_steps,
        ),
        mesh=mesh,
        share=share,
        writes=writes,
    )


class WindowStep:
    """Log-likelihoods of a batch's scored tokens; the prompts of a part are encoded before its first batch."""

    def __init__(self, programs: WindowPrograms) -> None:
        self._programs = programs
        self._prompts_ns: np.ndarray | None = None
        self._prefixes: Prefixes | None = None
        self._last: jax.Array | None = None

    def __call__(self, batch: PromptWindows) -> jax.Array:
        if batch.prompts_ns is not self._prompts_ns:
            jax.block_until_ready(self._last)  # so that the keys and values of two parts never take memory at once
            self._prefixes = None
            self._prefixes, self._prompts_ns = self._programs.encode(batch.prompts_ns), batch.prompts_ns
        assert self._prefixes is not None
        self._last = self._programs.log_likelihoods(self._prefixes, batch.windows)
        return self._last


def sums_of_steps(batch: PromptWindows, log_likelihoods_s: np.ndarray) -> pa.RecordBatch:
    """The log-likelihood of each step of the batch, summed over its tokens; no step is in two batches."""
    step_ids_s = batch.windows.step_ids_s
    real_s = step_ids_s >= 0
    steps, places = np.unique(step_ids_s[real_s], return_inverse=True)
    sums = np.zeros(len(steps))
    np.add.at(sums, places, np.asarray(log_likelihoods_s, np.float64)[real_s])
    return pa.record_batch([pa.array(steps), pa.array(sums)], schema=SCHEMA)


def assemble_local_naturalness(work: Work) -> tuple[float, ...]:
    """The scores of all parts, whichever worker computed them, in pool order; NaN for a trajectory without a score.

    A score is the mean over steps of the mean over a step's tokens of log pi(token | prompt, at most m steps before,
    step so far), in nats (Appendix C.2). Higher is better. NaN: the trajectory cannot be rendered, or the student's
    numbers are not finite.

    Raises:
      PipelineError: parts are missing or not readable; names them.
    """
    scores = np.full(len(work.pool.trajectories), np.nan)
    for number, table in work.streams.read_all():
        members = work.parts[number].members
        step_sizes = [work.step_sizes(member) for member in members]
        steps = table["step"].to_numpy()
        if not np.array_equal(np.sort(steps), np.arange(sum(map(len, step_sizes)))):
            raise PipelineError(
                f"{work.streams.path(number)}: holds other steps than those of its trajectories; delete this file and "
                "start the same command again"
            )
        sums = np.empty(len(steps))
        sums[steps] = table["log_likelihood"].to_numpy()
        ends = np.cumsum([len(sizes) for sizes in step_sizes])
        means = np.split(sums / np.concatenate(step_sizes), ends[:-1])
        scores[list(members)] = [steps.mean() for steps in means]
    return tuple(np.where(np.isfinite(scores), scores, np.nan).tolist())
