"""HF checkpoint folder -> decoder with its parameters on the devices of a mesh.

A process reads the rows that its own devices hold, once and in file order. In addition to the parameters it holds what
is read ahead and what is in transfer to devices, each within a budget.
"""

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from lark_jax.errors import CheckpointError
from lark_jax.runtime.prefetch import prefetch
from lark_jax.runtime.sharding import DATA, TENSOR, parameter_sharding
from lark_jax.runtime.terminal import progress_bar
from lark_jax.students.architecture import Architecture, read_architecture
from lark_jax.students.checkpoint.hf_names import (
    EMBEDDING_KEY,
    HEAD_KEY,
    LAYERS,
    check_keys,
    hf_slots,
    is_repeated_head,
)
from lark_jax.students.checkpoint.hub import local_folder
from lark_jax.students.checkpoint.placement import Piece, Target, destination_for, pieces
from lark_jax.students.checkpoint.safetensors_folder import CheckpointFiles, TensorReader, open_checkpoint
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import abstract_decoder, parameter_shapes, replace_parameters

_PIECE_BYTES = 8 << 20
_READ_AHEAD_BYTES = 128 << 20  # small enough that the allocator hands out the same pages again and again
_TRANSFER_BYTES = 128 << 20
_NUM_READERS = 4  # enough to keep a disk or a network file system busy
_QUIET_SECONDS = 10.0
_ROWS_PER_COMPARISON = 1_024


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
    """Loads a checkpoint of a supported family, see `families.FAMILIES`.

    Args:
      path_or_hub_id: folder with `config.json` and safetensors files, or a Hugging Face hub id.
      mesh: parameters are sharded over it by `sharding.PARAMETER_SPECS`; None: whole, on the default device.
      dtype: of the computation.
      param_dtype: of the parameters; None: `dtype`.
      remat, attention_backend: see `Decoder`.
      parameter_axes: the mesh axes that shard parameters; they are replicated along the others.

    Raises:
      CheckpointError: the folder is incomplete, unsupported, damaged, or does not match its `config.json`.
    """
    folder = local_folder(path_or_hub_id)
    architecture = read_architecture(folder)
    checkpoint = open_checkpoint(folder)
    check_keys(checkpoint.shapes(), architecture, folder)
    _check_repeated_head(checkpoint, architecture)
    param_dtype = jnp.dtype(dtype if param_dtype is None else param_dtype)
    targets = {}
    for name, shape in parameter_shapes(architecture).items():
        own = None if mesh is None else parameter_sharding(name, shape, mesh, parameter_axes)
        sharding = own or SingleDeviceSharding(jnp.zeros(()).device)
        targets[name] = Target(name, shape, name.startswith(LAYERS), param_dtype, sharding)
    parameters = _read_parameters(checkpoint, _plan(checkpoint, architecture, targets), targets)
    options = {"remat": remat, "attention_backend": attention_backend}
    graphdef, state = nnx.split(abstract_decoder(architecture, dtype, param_dtype, **options))
    return nnx.merge(graphdef, replace_parameters(state, parameters)), architecture


def lossless_dtype(folder: Path, dtype: DTypeLike) -> np.dtype:
    """The narrowest parameter dtype that gives a computation in `dtype` the same values as parameters in `dtype`.

    The checkpoint's dtype if `dtype` represents all its values, as float32 does for bfloat16: weights are then widened
    where they are used, a layer at a time. Else `dtype`.
    """
    stored = {header.dtype for header in open_checkpoint(folder).tensors.values()}
    narrowest = min(stored, key=lambda candidate: candidate.itemsize)
    return narrowest if stored == {narrowest} and jnp.promote_types(narrowest, dtype) == dtype else jnp.dtype(dtype)


def _plan(checkpoint: CheckpointFiles, architecture: Architecture, targets: Mapping[str, Target]) -> list[Piece]:
    """The pieces that this process reads, in file order."""
    slots = hf_slots(architecture)
    order = {file: index for index, file in enumerate(checkpoint.files)}
    headers = sorted((checkpoint.tensors[key] for key in slots), key=lambda header: (order[header.file], header.offset))
    plan: list[Piece] = []
    for header in headers:
        slot = slots[header.key]
        plan += pieces(header, targets[slot.name], slot.layer or 0, _PIECE_BYTES)
    return plan


def _read_parameters(
    checkpoint: CheckpointFiles, plan: Sequence[Piece], targets: Mapping[str, Target]
) -> dict[str, jax.Array]:
    destinations = {name: destination_for(target) for name, target in targets.items()}
    transfers = _Transfers(_TRANSFER_BYTES)
    num_bytes = sum(piece.nbytes for piece in plan)
    bar = progress_bar(what=f"load {checkpoint.folder.name}", total=num_bytes, unit="B", delay=_QUIET_SECONDS)
    with bar, TensorReader(checkpoint.files) as reader:
        fetched = prefetch(
            plan,
            lambda piece: destinations[piece.target.name].fetch(piece, reader),
            size=lambda piece: piece.host_bytes,
            budget=_READ_AHEAD_BYTES,
            num_threads=_NUM_READERS,
        )
        with contextlib.closing(fetched):  # threads stop before the files are closed
            for piece, values in fetched:
                transfers.add(destinations[piece.target.name].store(piece, values), piece.host_bytes)
                bar.update(piece.nbytes)
    return jax.block_until_ready({name: destination.finish() for name, destination in destinations.items()})


class _Transfers:
    """Host-to-device transfers in flight, each holding its host memory: at most `budget` bytes in total."""

    def __init__(self, budget: int) -> None:
        self._budget, self._held = budget, 0
        self._in_flight: deque[tuple[jax.Array, int]] = deque()

    def add(self, transfer: jax.Array | None, host_bytes: int) -> None:
        if transfer is None:
            return
        self._in_flight.append((transfer, host_bytes))
        self._held += host_bytes
        while self._held > self._budget:
            oldest, size = self._in_flight.popleft()
            jax.block_until_ready(oldest)
            self._held -= size


def _check_repeated_head(checkpoint: CheckpointFiles, architecture: Architecture) -> None:
    """A tied checkpoint may repeat its embedding under the head's name; the two must be equal."""
    if not is_repeated_head(HEAD_KEY, architecture) or HEAD_KEY not in checkpoint.tensors:
        return
    head, embedding = checkpoint.tensors[HEAD_KEY], checkpoint.tensors[EMBEDDING_KEY]
    equal = head.shape == embedding.shape and head.dtype == embedding.dtype
    with TensorReader({head.file, embedding.file}) as reader:
        for start in range(0, head.shape[0] if equal else 0, _ROWS_PER_COMPARISON):
            shape = (min(_ROWS_PER_COMPARISON, head.shape[0] - start), *head.shape[1:])
            both = np.empty((2, *shape), head.dtype)
            reader.read_rows(head, start, both[0])
            reader.read_rows(embedding, start, both[1])
            equal = equal and both[0].tobytes() == both[1].tobytes()
    if not equal:
        raise CheckpointError(
            f"{head.file}: {HEAD_KEY} differs from {EMBEDDING_KEY}, but config.json says tie_word_embeddings=true"
        )
