"""Students without a past: fresh weights, and a folder that describes them before they are trained."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lark_jax.files import write_json
from lark_jax.students.architecture import Architecture, config_from_architecture
from lark_jax.students.decoder import Decoder


def random_student(architecture: Architecture, seed: int, dtype: DTypeLike) -> Decoder:
    """A decoder with fresh weights, parameters and computation in `dtype`; equal seeds give equal weights."""
    return Decoder(architecture, jnp.dtype(dtype), jnp.dtype(dtype), rngs=nnx.Rngs(seed))


def write_student_config(architecture: Architecture, folder: str | Path) -> Path:
    """Writes `config.json` for `architecture` into `folder` and returns its path."""
    file = Path(folder) / "config.json"
    write_json(file, config_from_architecture(architecture))
    return file
