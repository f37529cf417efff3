"""The safetensors files of an HF checkpoint folder: which file holds which tensor, and at what offset.

The safetensors library checks each header against the file. Content is read with `preadv`, not through a memory map, so
that a file that shrinks in the meantime raises an error instead of crashing the process.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs to return it
import numpy as np
from safetensors import SafetensorError, safe_open

from lark_jax.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PREFIX_BYTES = 8  # a file starts with the size of its header
_DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor's entry in a file's header. Content is row-major and starts at byte `offset`."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the leading axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole tensor."""
        values = np.empty(self.shape, self.dtype)
        with TensorReader((self.file,)) as reader:
            reader.read_rows(self, 0, values)
        return values


class TensorReader:
    """Reads tensors of `files`, each opened once. Threads may share a reader. A context manager."""

    def __init__(self, files: Iterable[Path]) -> None:
        with contextlib.ExitStack() as stack:
            self._streams = {file: stack.enter_context(_open_unbuffered(file)) for file in files}
            self.close = stack.pop_all().close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read_rows(self, header: TensorHeader, start: int, out: np.ndarray) -> None:
        """Fills `out`, C-contiguous and in the tensor's dtype, with the rows from `start` on; reads only their bytes.

        Raises:
          CheckpointError: the file cannot be read, or ends before the last of these rows.
        """
        descriptor, offset = self._streams[header.file].fileno(), header.offset + start * header.row_bytes
        try:
            num_missing = _fill(out, descriptor, offset)
        except OSError as error:
            raise CheckpointError(f"{header.file}: cannot read tensor {header.key} ({error})") from error
        if num_missing:
            raise CheckpointError(
                f"{header.file}: ended {num_missing:,} bytes early while tensor {header.key} was read; "
                "it was truncated after it was opened; copy or download it again"
            )


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
      CheckpointError: no weights, weights in another format, a shard that is missing, truncated or contradicts the
        index, a tensor stored twice, or a dtype other than float32, float16 and bfloat16.
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


def _headers(file: Path) -> Iterator[TensorHeader]:
    opened = _open(file)
    start, table = _header_table(file)
    for key in opened.keys():  # noqa: SIM118  a safetensors handle, not a mapping
        view = opened.get_slice(key)
        if view.get_dtype() not in _DTYPES:
            raise CheckpointError(f"{file}: tensor {key} has dtype {view.get_dtype()}; supported: {', '.join(_DTYPES)}")
        offset = start + table[key]["data_offsets"][0]
        yield TensorHeader(key, file, tuple(view.get_shape()), _DTYPES[view.get_dtype()], offset)


def _open(file: Path) -> safe_open:
    """Checks the header against the file: sizes, offsets without gaps, the file's length."""
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: not a readable safetensors file, perhaps truncated ({reason})") from error


def _header_table(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header, which `_open` has checked; the library does not give offsets."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(_PREFIX_BYTES), "little")
        return _PREFIX_BYTES + size, json.loads(stream.read(size))


def _open_unbuffered(file: Path) -> io.FileIO:
    try:
        return io.FileIO(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened ({error})") from error


def _fill(out: np.ndarray, descriptor: int, offset: int) -> int:
    """Reads into `out` from byte `offset` on; returns how many bytes the file lacks."""
    view = out.reshape(-1, copy=False).view(np.uint8).data
    while view.nbytes:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            break
        view, offset = view[count:], offset + count
    return view.nbytes


def _no_weights_message(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: not a folder"
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickled:
        return (
            f"{folder}: {pickled[0].name} is a pickle, which can run code when it is loaded, and is not opened; "
            f"convert it to {SINGLE_FILE} (transformers: load it and call save_pretrained)"
        )
    return f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}"
