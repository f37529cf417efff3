"""The safetensors files of one HF checkpoint folder: which file holds which tensor, and slices of their content."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs to return it
import numpy as np
from safetensors import SafetensorError, safe_open

from lark_jax.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


@dataclass(frozen=True)
class TensorHeader:
    """What a file says about one tensor before any of its data is read."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or the part of it that `index` (one slice per axis) selects; only these bytes are read."""
        index = tuple(slice(None) for _ in self.shape) if index is None else index
        return _open(self.file).get_slice(self.key)[index]


@dataclass(frozen=True)
class CheckpointFiles:
    """Headers of all tensors by key, and the files in the order that the folder lists them."""

    folder: Path
    tensors: Mapping[str, TensorHeader]
    files: tuple[Path, ...]
    index_file: Path | None  # None: a single file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: header.shape for key, header in self.tensors.items()}

    def keys_of(self, file: Path) -> list[str]:
        return [key for key, header in self.tensors.items() if header.file == file]

    def metadata_of(self, file: Path) -> dict[str, str]:
        return _open(file).metadata() or {}


def open_checkpoint(folder: Path) -> CheckpointFiles:
    """Reads the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
      CheckpointError: no weights, weights of another kind, a shard that is absent, truncated or not as the index
        says, a tensor stored twice, or a dtype other than float32, float16 and bfloat16.
    """
    if (folder / SINGLE_FILE).is_file():
        file = folder / SINGLE_FILE
        return CheckpointFiles(folder, {header.key: header for header in _headers(file)}, (file,), None)
    if (folder / INDEX_FILE).is_file():
        return _open_shards(folder, folder / INDEX_FILE)
    raise CheckpointError(_no_weights_message(folder))


def _open_shards(folder: Path, index_file: Path) -> CheckpointFiles:
    weight_map = _read_weight_map(index_file)
    files = tuple(folder / name for name in dict.fromkeys(weight_map.values()))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{index_file}: {len(absent)} shard(s) not found: {', '.join(absent[:3])}")
    tensors: dict[str, TensorHeader] = {}
    for header in (header for file in files for header in _headers(file)):
        if header.key in tensors:
            first = tensors[header.key].file.name
            raise CheckpointError(f"{header.file}: tensor {header.key} is also stored in {first}; keep one of them")
        if weight_map.get(header.key) != header.file.name:
            listed = weight_map.get(header.key, "nowhere")
            raise CheckpointError(f"{header.file}: holds tensor {header.key}, which {index_file.name} lists {listed}")
        tensors[header.key] = header
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(f"{index_file}: {len(lost)} listed tensor(s) are in no shard: {', '.join(lost[:3])}")
    return CheckpointFiles(folder, tensors, files, index_file)


def _read_weight_map(index_file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index_file}: not a valid index with a weight_map ({error!r})") from error
    if not isinstance(weight_map, dict) or not all(_is_plain_name(name) for name in weight_map.values()):
        raise CheckpointError(f"{index_file}: weight_map must map tensor names to file names in the same folder")
    return weight_map


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _headers(file: Path) -> list[TensorHeader]:
    opened = _open(file)
    headers = []
    for key in opened.keys():  # noqa: SIM118  a safetensors handle, not a mapping
        view = opened.get_slice(key)
        if view.get_dtype() not in _DTYPES:
            raise CheckpointError(f"{file}: tensor {key} has dtype {view.get_dtype()}; supported: {', '.join(_DTYPES)}")
        headers.append(TensorHeader(key, file, tuple(view.get_shape()), _DTYPES[view.get_dtype()]))
    return headers


def _open(file: Path) -> safe_open:
    stat = file.stat()
    return _open_version(file, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _open_version(file: Path, mtime_ns: int, size: int) -> safe_open:
    """Maps the file into memory; the last one stays mapped because neighbouring tensors are read one by one."""
    del mtime_ns, size
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: not a readable safetensors file, perhaps truncated ({reason})") from error


def _no_weights_message(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: not a folder"
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickled:
        return (
            f"{folder}: {pickled[0].name} is a pickle, which can run code when it is read, and is not opened; convert "
            f"it to {SINGLE_FILE} (transformers: load it and call save_pretrained)"
        )
    return f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}"
