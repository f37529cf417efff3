"""Causal grouped-query attention: one function, `attend`, and the choice among its backends."""

import math
from collections.abc import Mapping, Sequence

import jax

from lark_jax.errors import ConfigError
from lark_jax.students.attention.blockwise import BLOCKWISE
from lark_jax.students.attention.contract import DENSE, AttentionSpec, Backend, Options
from lark_jax.students.attention.cudnn import CUDNN
from lark_jax.students.attention.splash import SPLASH
from lark_jax.students.attention.triton import TRITON

# Measured on a CPU (4 heads of 32, forward and backward): about equal here, dense 2x slower at 512, 6x at 2,048.
LONGEST_DENSE_ROW = 256
LONGEST_DENSE_ROW_WITH_KERNELS = 128  # one block of a kernel
AMPERE = 8.0  # the first compute capability with cuDNN's flash kernels
# By platform, as `jax.default_backend()` names it: the first one that can compute what is asked for is chosen.
KERNELS: Mapping[str, Sequence[str]] = {"gpu": ("cudnn", "triton"), "tpu": ("splash",)}
BACKENDS: Mapping[str, Backend] = {
    "dense": DENSE,
    "blockwise": BLOCKWISE,
    "cudnn": CUDNN,
    "triton": TRITON,
    "splash": SPLASH,
}


def attend(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> jax.Array:
    """softmax(scale q k') v over the keys that each query may see.

    Args:
      q_bthd: [batch, time, num_heads, head_dim]; query head h reads key head h // (num_heads / num_kv_heads).
      k_bskd: [batch, time, num_kv_heads, head_dim].
      v_bskd: as `k_bskd`.
      segment_ids: int [batch, time]; tokens of different segments do not see each other. A segment is contiguous.
        None: one segment per row.
      scale: None: 1 / sqrt(head_dim).
      window: a query sees itself and the `window` - 1 keys before it, as with HF's `sliding_window`. None: all before.
      backend: a key of `BACKENDS`; None: `default_backend` for this machine. On several TPU devices the Pallas kernel
        runs only inside `shard_map`, since the compiler cannot partition it; with `check_vma=False`, since the kernel
        does not declare over which axes its results vary.

    Returns:
      [batch, time, num_heads, head_dim] in the dtype of `q_bthd`; scores and softmax are fp32.

    Raises:
      ValueError: unknown backend, or one that cannot compute this (dtype, head_dim, segment ids, window, scale); or
        `scale` or `window` is not positive.
      ConfigError: the backend is not installed.
    """
    for name, value in (("scale", scale), ("window", window)):
        if value is not None and value <= 0:
            raise ValueError(f"attention {name}={value}: expected a positive number")
    _, time, _, head_dim = q_bthd.shape
    spec = AttentionSpec(q_bthd.dtype, head_dim, segment_ids is not None, window, scale).for_rows_of(time)
    if backend is None:
        backend = default_backend(time, _platform(), spec)
    refusal = _backend(backend).refusal(spec)
    if refusal is not None:
        able = (name for name, other in BACKENDS.items() if other.refusal(spec) is None)
        raise ValueError(f"attention backend {backend!r} {refusal}; these can: {', '.join(able)}")
    with jax.named_scope(f"attention_{backend}"):
        return BACKENDS[backend].attention(q_bthd, k_bskd, v_bskd, Options(segment_ids, scale, spec.window))


def default_backend(length: int, platform: str, spec: AttentionSpec) -> str:
    """The backend for rows of `length` tokens on `platform`: "cpu", "gpu" or "tpu"."""
    for kernel in KERNELS.get(platform, ()):
        if BACKENDS[kernel].refusal(spec.for_rows_of(length)) is None:
            return "dense" if length <= LONGEST_DENSE_ROW_WITH_KERNELS else kernel
    return "dense" if length <= LONGEST_DENSE_ROW else "blockwise"


def describe_backend(backend: str | None, lengths: Sequence[int], platform: str, spec: AttentionSpec) -> str:
    """One line that names what `attend` will use for rows of these lengths; none: they are not known yet.

    Raises:
      ConfigError: `backend` cannot run on this platform, or not for this student.
    """
    if backend is not None:
        _check_runs_here(backend, platform, spec.for_rows_of(max(lengths, default=math.inf)))
        return f"attention: {backend}"
    rows_of: dict[str, list[int]] = {}
    for length in sorted(lengths):
        rows_of.setdefault(default_backend(length, platform, spec), []).append(length)
    kind = "packed rows" if spec.packed else "rows"
    uses = [f"{name} ({kind} of {_interval(rows)} tokens)" for name, rows in rows_of.items()]
    return f"attention: {', '.join(uses)}"


def _backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def kernel_platform(device: jax.Device) -> str:
    """The platform whose kernels run on `device`; "cpu", which has none, for GPUs that cuDNN's flash kernels refuse."""
    if device.platform != "gpu":
        return device.platform
    try:
        return "gpu" if float(device.compute_capability) >= AMPERE else "cpu"
    except ValueError:  # not an NVIDIA GPU
        return "cpu"


def _platform() -> str:
    """The platform whose kernels can be called at this point of a trace."""
    platform = jax.default_backend()
    if platform == "gpu":
        platform = kernel_platform(jax.devices()[0])
    inside_shard_map = bool(jax.sharding.get_abstract_mesh().manual_axes)
    partitioned_by_the_compiler = not inside_shard_map and jax.device_count() > 1
    return "cpu" if platform == "tpu" and partitioned_by_the_compiler else platform


def _check_runs_here(backend: str, platform: str, spec: AttentionSpec) -> None:
    home = next((where for where, kernels in KERNELS.items() if backend in kernels), platform)
    if home != platform:
        raise ConfigError(f"attention backend {backend!r} runs on {home}, not on {platform}; use 'auto' or 'blockwise'")
    refusal = _backend(backend).refusal(spec)
    if refusal is not None:
        raise ConfigError(f"attention backend {backend!r} {refusal}; use 'auto' or 'blockwise'")


def _interval(rows: Sequence[int]) -> str:
    return f"{rows[0]:,}" if rows[0] == rows[-1] else f"{rows[0]:,} to {rows[-1]:,}"
