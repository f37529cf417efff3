"""The loss on trajectories of problems that the student is not trained on."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lark_jax.config import FinetuneConfig
from lark_jax.errors import TrainingError
from lark_jax.finetuning.data import Example
from lark_jax.finetuning.optimizer import Parameters
from lark_jax.finetuning.parameter_sets import NOTHING_FROZEN
from lark_jax.rendering.batching import TokenRows, assemble, bucket_lengths
from lark_jax.rendering.row_plans import plan_micro_batches
from lark_jax.runtime.sharding import DATA, split_rows
from lark_jax.scoring.step import compile_score_step
from lark_jax.students.sharded import ShardedStudent


class HeldOutLoss:
    """Mean over trajectories of the mean cross-entropy of their target tokens, without weights, nats.

    This is the forward pass of the score stage in the layout of `student`: before training it equals the mean of `loss`
    in the score table, up to rounding. If the mesh spans several processes, all of them call it.

    Args:
      student: `ShardedStudent.abstract`, with the compute dtype.
      frozen: the parameters that are not trained.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        student: ShardedStudent,
        config: FinetuneConfig,
        pad_id: int,
        frozen: Mapping[str, jax.Array] = NOTHING_FROZEN,
    ) -> None:
        self._examples = examples
        self._mesh = student.mesh
        self._frozen = frozen
        rendered = [example.rendered for example in examples]
        lengths = {member: trajectory.num_inputs for member, trajectory in enumerate(rendered)}
        buckets = bucket_lengths(max(lengths.values(), default=1))
        plans = plan_micro_batches(lengths, buckets, config.tokens_per_batch, student.mesh.shape[DATA])
        self._batches = [assemble(rendered, plan, pad_id) for plan in plans]
        step, dtype = compile_score_step(student, config.vocab_chunk), student.structure.dtype

        def losses(parameters: Parameters, *arrays: jax.Array) -> jax.Array:
            return step({name: value.astype(dtype) for name, value in parameters.items()}, *arrays)["loss"]

        self._losses = jax.jit(losses)

    def __call__(self, parameters: Parameters) -> float:
        """The loss of the student with these float32 parameters and the frozen ones.

        Raises:
          TrainingError: it is not finite; names the trajectories.
        """
        parameters = {**self._frozen, **parameters}
        waiting = [(batch.row_ids_b, self._losses(parameters, *self._put(batch))) for batch in self._batches]
        losses = np.zeros(len(self._examples))
        for row_ids_b, losses_b in waiting:
            losses[row_ids_b[row_ids_b >= 0]] = np.asarray(losses_b)[row_ids_b >= 0]
        if not np.all(np.isfinite(losses)):
            culprits = [self._examples[member].name for member in np.flatnonzero(~np.isfinite(losses))]
            raise TrainingError(
                f"the held-out loss is not finite for {', '.join(culprits)}; look at these trajectories"
            )
        return float(np.mean(losses))

    def _put(self, batch: TokenRows) -> tuple[jax.Array, ...]:
        return tuple(split_rows(array, self._mesh) for array in (batch.tokens_bt, batch.targets_bt, batch.mask_bt))
