"""What preflight finds out: one finding per compiled program, and what they mean for the run."""

import dataclasses

from lark_jax.preflight.cost import Assumptions, PoolTime, StepCost, StepTime
from lark_jax.preflight.lengths import Lengths
from lark_jax.preflight.remedies import Remedy
from lark_jax.preflight.requests import CompileAnswer, CompileRequest
from lark_jax.preflight.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Finding:
    """One compiled program: what was asked, what came out, and what it costs."""

    request: CompileRequest
    answer: CompileAnswer
    cost: StepCost
    time: StepTime


@dataclasses.dataclass(frozen=True)
class Findings:
    """Of one run.

    Attributes:
      remedy: for all programs together; only where one of them does not fit.
      pool: with the remedy where there is one.
    """

    student: str
    topology: Topology
    programs: tuple[Finding, ...]
    remedy: Remedy | None
    lengths: Lengths
    pool: PoolTime
    assumptions: Assumptions

    @property
    def fits(self) -> bool:
        return all(program.answer.memory.fits for program in self.programs)
