"""Student path or hub id -> local folder."""

import functools
import re
from pathlib import Path

from lark_jax.errors import CheckpointError
from lark_jax.runtime.files import files_below
from lark_jax.runtime.hub import Unavailable, snapshot

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")  # named templates: transformers, older folders


def loaded_files(folder: Path) -> tuple[Path, ...]:
    """The files of a student's folder that determine its output: weights, configuration, tokenizer; sorted.

    All files if there are no safetensors: an engine may read weights in another format.
    """
    templates = (f"{name}/*.jinja" for name in TEMPLATE_FOLDERS)
    found = {file for pattern in (*_PATTERNS, *templates) for file in folder.glob(pattern) if file.is_file()}
    if not any(file.suffix == ".safetensors" for file in found):
        return tuple(files_below(folder))
    return tuple(sorted(file for file in found if not file.name.startswith(".")))


def local_folder(path_or_hub_id: str | Path) -> Path:
    """`path_or_hub_id` itself if it is a folder; else the hub's snapshot of it, downloaded unless it is cached.

    Only configuration, safetensors and tokenizer files are downloaded, into Hugging Face's usual cache;
    `HF_HUB_OFFLINE=1` forbids downloads.

    Raises:
      CheckpointError: neither a folder nor a hub id (a `Path` never is one), or the snapshot is not available.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: is a file; a student is a folder with config.json and safetensors files")
    if not may_be_hub_id(path_or_hub_id):
        raise CheckpointError(f"{path}: no such folder, and not a Hugging Face hub id")
    return _snapshot(str(path_or_hub_id))


def may_be_hub_id(path_or_hub_id: str | Path) -> bool:
    """Whether it has the form of a hub id and does not begin with a folder that exists here."""
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(path_or_hub_id):
        return False
    first = Path(path_or_hub_id).parts[0]
    return first == path_or_hub_id or not Path(first).is_dir()


@functools.cache  # stages hash and load the same snapshot even if the hub changes in between
def _snapshot(hub_id: str) -> Path:
    try:
        return snapshot(hub_id, _PATTERNS)
    except Unavailable as error:
        raise CheckpointError(f"{hub_id}: no such folder, and {error}") from error
