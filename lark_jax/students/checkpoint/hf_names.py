"""The mapping between HF's tensor names and ours. A bijection: one HF tensor is one layer of one parameter."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lark_jax.errors import CheckpointError
from lark_jax.students.architecture import Architecture
from lark_jax.students.parameters import parameter_shapes

LAYERS = "layers."
HEAD_KEY = "lm_head.weight"
EMBEDDING_KEY = "model.embed_tokens.weight"
# Buffers that old exporters wrote; every reader computes them from config.json.
_IGNORED_KEYS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_NUM_SHOWN = 3


@dataclass(frozen=True)
class Slot:
    """Where an HF tensor goes: parameter `name`, at `layer` of its leading axis (None: it is not stacked)."""

    name: str
    layer: int | None
    shape: tuple[int, ...]


def hf_slots(architecture: Architecture) -> dict[str, Slot]:
    """HF key -> slot, for every tensor of a checkpoint of `architecture`."""
    return slots_of(parameter_shapes(architecture))


def slots_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """HF key -> slot, for parameters by their dotted names."""
    slots = {}
    for name, shape in shapes.items():
        if name.startswith(LAYERS):
            for layer in range(shape[0]):
                slots[f"model.layers.{layer}.{name.removeprefix(LAYERS)}"] = Slot(name, layer, shape[1:])
        else:
            key = name if name == HEAD_KEY else f"model.{name}"
            slots[key] = Slot(name, None, shape)
    return slots


def is_ignored(key: str) -> bool:
    return _IGNORED_KEYS.fullmatch(key) is not None


def is_repeated_head(key: str, architecture: Architecture) -> bool:
    """Whether `key` is a tied head that the exporter wrote in addition to the embedding, which it must equal."""
    return architecture.tie_word_embeddings and key == HEAD_KEY


def check_keys(shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, where: object) -> None:
    """Raises CheckpointError, which lists them all, for tensors that are missing, unexpected or of the wrong shape."""
    slots = hf_slots(architecture)
    unexpected = [
        key for key in shapes if key not in slots and not is_ignored(key) and not is_repeated_head(key, architecture)
    ]
    missing = [key for key in slots if key not in shapes]
    misshapen = [
        f"{key} {list(shapes[key])} instead of {list(slot.shape)}"
        for key, slot in slots.items()
        if key in shapes and tuple(shapes[key]) != slot.shape
    ]
    faults = [("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen)]
    found = [f"{len(keys)} {what} ({_first_few(keys)})" for what, keys in faults if keys]
    if found:
        raise CheckpointError(f"{where}: tensors do not match config.json: " + "; ".join(found))


def _first_few(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:_NUM_SHOWN]) + (", ..." if len(keys) > _NUM_SHOWN else "")
