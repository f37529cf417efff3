"""Student path -> local folder. The only place that can reach the network, and it says so first."""

import os
import re
from pathlib import Path

from lark_jax.errors import CheckpointError
from lark_jax.runtime import say

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


def local_folder(path_or_hub_id: str | Path) -> Path:
    """`path_or_hub_id` itself where it is a folder; else the hub's snapshot of it, downloaded when not yet cached.

    Only configuration, safetensors and tokenizer files are fetched, into Hugging Face's usual cache; `HF_HUB_OFFLINE=1`
    forbids downloads.

    Raises:
      CheckpointError: neither a folder nor a hub id (a `Path` never is one), or the snapshot cannot be had.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    hub_id = path_or_hub_id if isinstance(path_or_hub_id, str) else ""
    if path.exists():
        raise CheckpointError(f"{path}: is a file; a student is a folder with config.json and safetensors files")
    if not _HUB_ID.fullmatch(hub_id) or (path.parts[0] != hub_id and Path(path.parts[0]).is_dir()):
        raise CheckpointError(f"{path}: no such folder, and not a Hugging Face hub id")
    return _snapshot(hub_id)


def _snapshot(hub_id: str) -> Path:
    import huggingface_hub

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if not offline:
        say(f"{hub_id}: not a local folder; fetching {', '.join(_PATTERNS)} from the Hugging Face hub")
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_PATTERNS), local_files_only=offline))
    except Exception as error:  # the hub client raises many unrelated types: HTTP, offline, validation, disk
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{hub_id}: no such folder, and not to be had from the Hugging Face hub: {why}"
        ) from error
