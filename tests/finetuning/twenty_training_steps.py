"""Twenty optimizer steps of a tiny student on any mesh; as a program, in one of two processes."""

import dataclasses
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tiny_run import ARCHITECTURE, CONFIG, PAD_ID, random_examples

from lark_jax.config import MeshConfig
from lark_jax.finetuning.data import TrainingSet
from lark_jax.finetuning.loop import run_step
from lark_jax.finetuning.optimizer import make_optimizer
from lark_jax.finetuning.step import TrainState, initial_state, make_train_step, zero_sums
from lark_jax.rendering.batching import BatchPlan
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students.architecture import Architecture
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import flatten_parameters, replace_parameters
from lark_jax.students.sharded import ShardedStudent

LENGTH = 64


def mesh_of(data: int, tensor: int) -> Mesh:
    return make_mesh(MeshConfig(data, tensor), jax.devices()[: data * tensor])


def student_of(architecture: Architecture, seed: int) -> Decoder:
    """Weights of a size at which attention, biases and norms matter."""
    student, rng = Decoder(architecture, rngs=nnx.Rngs(0)), np.random.default_rng(seed)
    graph, state = nnx.split(student)
    values = {
        name: jnp.asarray(1.0 * name.endswith("norm.weight") + rng.normal(scale=0.2, size=value.shape), jnp.float32)
        for name, value in flatten_parameters(state).items()
    }
    return nnx.merge(graph, replace_parameters(state, values))


class Trace(NamedTuple):
    losses: tuple[float, ...]
    state: TrainState  # after the steps

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return jax.tree.map(np.asarray, self.state.parameters)


def twenty_steps(mesh: Mesh) -> Trace:
    student = student_of(ARCHITECTURE, 5)
    config = dataclasses.replace(CONFIG, learning_rate=1e-3)
    examples = random_examples(6, 10, 4)
    optimizer, set_of = make_optimizer(config, 20), TrainingSet(examples, 8, seed=1)
    layout = ShardedStudent.abstract(student, mesh)
    train_step = make_train_step(layout, optimizer, vocab_chunk=48)
    state = initial_state(student, layout, optimizer)
    sums, losses = zero_sums(layout), []
    for step in range(20):
        batch = set_of.batch(step)
        # Rows of the longest length, so that one shape is compiled.
        micro_batches = [set_of.micro_batch(BatchPlan(LENGTH, 8, batch.members), len(batch.members), PAD_ID)]
        applied, cross_entropies = run_step(train_step, state, sums, micro_batches, mesh)
        state, sums = applied.state, applied.sums
        found = {}
        for micro_batch, cross_entropy_bt in zip(micro_batches, cross_entropies, strict=True):
            found |= micro_batch.mean_losses(np.asarray(cross_entropy_bt))
        losses.append(float(np.mean([examples[member].weight * found[member] for member in batch.members])))
    return Trace(tuple(losses), state)


if __name__ == "__main__":
    port, process, data, tensor, out = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    np.save(out, twenty_steps(make_mesh(MeshConfig(int(data), int(tensor)))).losses)
