"""HF checkpoint folder -> decoder whose parameters lie on the devices of a mesh.

Every process reads only the slices that its own devices hold, one HF tensor at a time, so that host memory stays
at the size of one tensor.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from lark_jax.errors import CheckpointError
from lark_jax.sharding import DATA, TENSOR, parameter_sharding
from lark_jax.students.architecture import Architecture, read_architecture
from lark_jax.students.decoder import Decoder
from lark_jax.students.hf_names import EMBEDDING_KEY, HEAD_KEY, check_keys, hf_slots, is_repeated_head
from lark_jax.students.hub import local_folder
from lark_jax.students.parameters import abstract_decoder, parameter_shapes, replace_parameters
from lark_jax.students.safetensors_folder import CheckpointFiles, TensorHeader, open_checkpoint

_ROWS_PER_COMPARISON = 4_096


def load_student(
    path_or_hub_id: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    remat: str = "none",
    parameter_axes: Sequence[str] = (DATA, TENSOR),
    attention_backend: str | None = None,
) -> tuple[Decoder, Architecture]:
    """Loads a Qwen2, Qwen3, Llama or Mistral checkpoint.

    Args:
      path_or_hub_id: folder with `config.json` and safetensors files, or a Hugging Face hub id.
      mesh: parameters are laid out over it by `sharding.PARAMETER_SPECS`; None: whole, on the default device.
      dtype: of the computation.
      param_dtype: of the parameters; None: `dtype`.
      remat: see `Decoder`.
      parameter_axes: the mesh axes that split parameters; they are whole along the others. (): on every device.
      attention_backend: see `Decoder`.

    Raises:
      CheckpointError: the folder is incomplete, unsupported, damaged, or does not match its `config.json`.
    """
    folder = local_folder(path_or_hub_id)
    architecture = read_architecture(folder)
    checkpoint = open_checkpoint(folder)
    check_keys(checkpoint.shapes(), architecture, folder)
    _check_repeated_head(checkpoint, architecture)
    param_dtype = jnp.dtype(dtype if param_dtype is None else param_dtype)
    parameters = _read_parameters(checkpoint, architecture, mesh, tuple(parameter_axes), param_dtype)
    options = {"remat": remat, "attention_backend": attention_backend}
    graphdef, state = nnx.split(abstract_decoder(architecture, dtype, param_dtype, **options))
    return nnx.merge(graphdef, replace_parameters(state, parameters)), architecture


def _read_parameters(
    checkpoint: CheckpointFiles, architecture: Architecture, mesh: Mesh | None, axes: Sequence[str], dtype: np.dtype
) -> dict[str, jax.Array]:
    headers: dict[str, dict[int | None, TensorHeader]] = {}
    for key, slot in hf_slots(architecture).items():
        headers.setdefault(slot.name, {})[slot.layer] = checkpoint.tensors[key]
    parameters = {}
    for name, shape in parameter_shapes(architecture).items():
        sharding = _sharding(name, shape, mesh, axes)
        if None in headers[name]:
            parameters[name] = _read_tensor(headers[name][None], sharding, dtype)
        else:
            per_layer = [headers[name][layer] for layer in range(shape[0])]
            parameters[name] = _read_stacked(per_layer, shape, sharding, dtype)
    return parameters


def _sharding(name: str, shape: tuple[int, ...], mesh: Mesh | None, axes: Sequence[str]) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jnp.zeros(()).device)
    return parameter_sharding(name, shape, mesh, axes)


def _read_tensor(header: TensorHeader, sharding: Sharding, dtype: np.dtype) -> jax.Array:
    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        return header.read(index).astype(dtype, copy=False)

    # Waiting keeps one tensor at a time in host memory; transfers would queue up otherwise.
    return jax.block_until_ready(jax.make_array_from_callback(header.shape, sharding, read))


def _read_stacked(
    per_layer: list[TensorHeader], shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype
) -> jax.Array:
    stacked = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    layer_sharding = _without_leading_axis(sharding)
    for layer, header in enumerate(per_layer):
        stacked = _set_layer(stacked, _read_tensor(header, layer_sharding, dtype), layer)
    return jax.block_until_ready(stacked)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, value, layer, axis=0)


def _without_leading_axis(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _check_repeated_head(checkpoint: CheckpointFiles, architecture: Architecture) -> None:
    """A tied checkpoint may repeat its embedding under the head's name, but not differ from it."""
    if not is_repeated_head(HEAD_KEY, architecture) or HEAD_KEY not in checkpoint.tensors:
        return
    head, embedding = checkpoint.tensors[HEAD_KEY], checkpoint.tensors[EMBEDDING_KEY]
    equal = head.shape == embedding.shape and head.dtype == embedding.dtype
    for start in range(0, head.shape[0] if equal else 0, _ROWS_PER_COMPARISON):
        index = (slice(start, min(start + _ROWS_PER_COMPARISON, head.shape[0])), slice(None))
        equal = equal and head.read(index).tobytes() == embedding.read(index).tobytes()
    if not equal:
        raise CheckpointError(
            f"{head.file}: {HEAD_KEY} differs from {EMBEDDING_KEY}, but config.json says tie_word_embeddings=true"
        )
