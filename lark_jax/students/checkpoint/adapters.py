"""Fresh adapters, as PEFT starts them (peft/tuners/lora/layer.py, `reset_lora_parameters`)."""

import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lark_jax.runtime.sharding import parameter_sharding
from lark_jax.students.decoder import Decoder
from lark_jax.students.lora import FACTOR_B, Lora, is_factor
from lark_jax.students.parameters import abstract_decoder, flatten_parameters, replace_parameters, shapes_of


def with_fresh_adapter(student: Decoder, lora: Lora, seed: int, mesh: Mesh) -> Decoder:
    """A decoder that shares the parameters of `student` and has an adapter, float32 and laid out over `mesh`.

    A is uniform in +-1 / sqrt(in), which is Kaiming's distribution for a = sqrt(5). B is zero, so that the decoder
    computes what `student` computes. Equal seeds give equal adapters, on any mesh.
    """
    structure = abstract_decoder(
        student.architecture, student.dtype, remat=student.remat, attention_backend=student.attention_backend, lora=lora
    )
    shapes = {name: shape for name, shape in shapes_of(structure).items() if is_factor(name)}
    shardings = {name: parameter_sharding(name, shape, mesh) for name, shape in shapes.items()}

    def draw() -> dict[str, jax.Array]:
        return {name: _fresh(name, shape, seed) for name, shape in shapes.items()}

    parameters = flatten_parameters(nnx.state(student, nnx.Param)) | jax.jit(draw, out_shardings=shardings)()
    graph, state = nnx.split(structure)
    return nnx.merge(graph, replace_parameters(state, parameters))


def _fresh(name: str, shape: tuple[int, ...], seed: int) -> jax.Array:
    if name.endswith(FACTOR_B):
        return jnp.zeros(shape, jnp.float32)
    bound = 1 / math.sqrt(shape[-1])
    # From the name, not the index: a layer's adapter does not depend on which other layers have one.
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
