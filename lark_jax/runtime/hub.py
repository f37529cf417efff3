"""Files of the Hugging Face hub: the only code that downloads anything, and it announces every download."""

import os
from collections.abc import Sequence
from pathlib import Path

from lark_jax.errors import one_line


class Unavailable(Exception):
    """A snapshot cannot be fetched; the message gives the reason, and callers add what to do."""


def snapshot(hub_id: str, patterns: Sequence[str], repo_type: str = "model") -> Path:
    """The folder with the files of a repository that match `patterns`, downloaded if not yet cached.

    Files go into Hugging Face's usual cache; `HF_HUB_OFFLINE=1` forbids downloads. No code of a repository is run.

    Args:
      repo_type: "model" or "dataset".

    Raises:
      Unavailable: neither the hub nor the cache has it.
    """
    import huggingface_hub

    from lark_jax.runtime.terminal import say  # not at the top: it imports JAX, which pure readers do not need

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if not offline:
        say(f"{hub_id}: {', '.join(patterns)} of this {repo_type}, from the Hugging Face hub or its cache")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, repo_type=repo_type, allow_patterns=list(patterns), local_files_only=offline
            )
        )
    except Exception as error:  # the hub client raises many unrelated types: HTTP, offline, validation, disk
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else one_line(error)[:300]
        raise Unavailable(f"not available on the Hugging Face hub as a {repo_type}: {why}") from error
