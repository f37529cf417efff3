"""Decoder -> HF checkpoint folder that transformers and vLLM load unchanged, written shard by shard."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lark_jax.errors import CheckpointError
from lark_jax.runtime.files import atomic_directory
from lark_jax.students.architecture import read_architecture, read_json_object
from lark_jax.students.checkpoint.hf_names import (
    EMBEDDING_KEY,
    Slot,
    check_keys,
    hf_slots,
    is_ignored,
    is_repeated_head,
    slots_of,
)
from lark_jax.students.checkpoint.hub import TEMPLATE_FOLDERS, local_folder
from lark_jax.students.checkpoint.safetensors_folder import SINGLE_FILE, CheckpointFiles, TensorHeader, open_checkpoint
from lark_jax.students.decoder import Decoder
from lark_jax.students.lora import Lora, factors_of, is_factor
from lark_jax.students.parameters import flatten_parameters

GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
_PEFT_PREFIX = "base_model.model."  # PEFT's wrapper around the model
TOKENIZER_CONFIG = "tokenizer_config.json"
# What loading a model or its tokenizer can need in addition to the weights; weights in other formats are not copied.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")


def export_student(
    model: Decoder,
    source: str | Path,
    out_dir: str | Path,
    *,
    end_of_turn_id: int | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes `model` into `out_dir` in the format of the checkpoint `source` that it was loaded from.

    Tensors keep the source's names, dtypes and distribution over files; configuration, tokenizer and chat template
    are byte-identical copies unless an argument below changes them. `out_dir` is written atomically; host memory holds
    one file's tensors. An adapter is merged: W + scaling B A, from the source's own W, computed in float32 and rounded
    once; all other tensors then keep the source's bytes.

    Args:
      model: decoder of the source's architecture; with an adapter, one that was trained on this source.
      source: folder or hub id.
      out_dir: replaced if it exists.
      end_of_turn_id: added to `eos_token_id` of `generation_config.json`, so that generation ends with the turn.
      chat_template: Jinja text that the student was trained with, written as `chat_template.jinja` in place of every
        template of the source. None keeps the source's.

    Raises:
      CheckpointError: the source is damaged or of another architecture, or `out_dir` is the source.
    """
    source, out_dir = local_folder(source), Path(out_dir)
    checkpoint = open_checkpoint(source)
    _check_export(model, checkpoint, out_dir)
    with atomic_directory(out_dir) as directory:
        _copy_companions(source, directory)
        _write_generation_config(directory, end_of_turn_id)
        if chat_template is not None:
            _replace_chat_templates(directory, chat_template)
        for file in checkpoint.files:
            tensors = dict(_tensors_of(file, checkpoint, model))
            save_file(tensors, directory / file.name, metadata=checkpoint.metadata_of(file) or {"format": "pt"})


def export_adapter(model: Decoder, base: str, out_dir: str | Path) -> None:
    """Writes the adapter of `model`, in float32 and PEFT's format; `base`, a folder or hub id, is what it adapts."""
    if model.lora is None:
        raise ValueError("the student has no adapter to export")
    parameters = flatten_parameters(nnx.state(model, nnx.Param))
    slots = slots_of({name: value.shape for name, value in parameters.items() if is_factor(name)})
    tensors = {_PEFT_PREFIX + key: _to_host(parameters[slot.name], slot.layer) for key, slot in slots.items()}
    with atomic_directory(Path(out_dir)) as directory:
        config = json.dumps(_peft_config(model.lora, base), indent=2) + "\n"
        (directory / ADAPTER_CONFIG).write_text(config, encoding="utf-8")
        save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})


def save_new_student(model: Decoder, config_folder: str | Path, out_dir: str | Path) -> None:
    """Writes a student that has no source checkpoint: one `model.safetensors` in the parameters' own dtype.

    Args:
      model: decoder of the architecture that `config_folder/config.json` describes.
      config_folder: folder with `config.json` and tokenizer files, which are copied.
      out_dir: replaced if it exists.
    """
    config_folder, out_dir = Path(config_folder), Path(out_dir)
    if read_architecture(config_folder) != model.architecture:
        raise CheckpointError(
            f"{config_folder}/config.json: describes an architecture that differs from the student to save"
        )
    parameters = flatten_parameters(nnx.state(model, nnx.Param))
    slots = hf_slots(model.architecture)
    tensors = {key: _to_host(parameters[slot.name], slot.layer) for key, slot in slots.items()}
    with atomic_directory(out_dir) as directory:
        _copy_companions(config_folder, directory)
        save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})


def _check_export(model: Decoder, checkpoint: CheckpointFiles, out_dir: Path) -> None:
    if out_dir.resolve() == checkpoint.folder.resolve():
        raise CheckpointError(f"{out_dir}: is the source checkpoint; export into another folder")
    if read_architecture(checkpoint.folder) != model.architecture:
        raise CheckpointError(f"{checkpoint.folder}: has an architecture that differs from the student to export")
    check_keys(checkpoint.shapes(), model.architecture, checkpoint.folder)


def _tensors_of(file: Path, checkpoint: CheckpointFiles, model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    slots = hf_slots(model.architecture)
    parameters = flatten_parameters(nnx.state(model, nnx.Param))
    for key in checkpoint.keys_of(file):
        header = checkpoint.tensors[key]
        if is_ignored(key):
            yield key, header.read()
        else:
            slot = slots[EMBEDDING_KEY if is_repeated_head(key, model.architecture) else key]
            yield key, _stored_value(header, slot, parameters, model.lora)


def _stored_value(
    header: TensorHeader, slot: Slot, parameters: Mapping[str, jax.Array], lora: Lora | None
) -> np.ndarray:
    """The value to store for a tensor of the source, in its dtype; an adapter is merged."""
    if lora is None:
        return _to_host(parameters[slot.name], slot.layer).astype(header.dtype, copy=False)
    base, factors = header.read(), factors_of(slot.name)
    if factors[0] not in parameters:
        return base
    a, b = (_to_host(parameters[name], slot.layer) for name in factors)
    return (base.astype(np.float32) + np.float32(lora.scaling) * (b @ a)).astype(header.dtype)


def _peft_config(lora: Lora, base: str) -> dict[str, Any]:
    """PEFT's configuration; all other fields keep their defaults."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _to_host(parameter: jax.Array, layer: int | None) -> np.ndarray:
    """The parameter, or one of its layers, gathered from all devices."""
    return np.ascontiguousarray(parameter if layer is None else _take_layer(parameter, layer))


@jax.jit
def _take_layer(parameter: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(parameter, layer, axis=0, keepdims=False)


def _copy_companions(source: Path, directory: Path) -> None:
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, directory / file.name)
    for name in TEMPLATE_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, directory / name)


def _write_generation_config(directory: Path, end_of_turn_id: int | None) -> None:
    """Adds the end-of-turn token to the stop tokens, and changes nothing else."""
    if end_of_turn_id is None:
        return
    file = directory / GENERATION_CONFIG
    values = read_json_object(file) if file.is_file() else {}
    known = values.get("eos_token_id", read_json_object(directory / "config.json").get("eos_token_id"))
    known_ids = [] if known is None else known if isinstance(known, list) else [known]
    values["eos_token_id"] = [*known_ids, *([] if end_of_turn_id in known_ids else [end_of_turn_id])]
    # Marks the file as derived from config.json; transformers 4 would then rebuild it from there.
    values.pop("_from_model_config", None)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _replace_chat_templates(directory: Path, chat_template: str) -> None:
    """Makes `chat_template` the only one: libraries differ in which of several they prefer."""
    for name in TEMPLATE_FOLDERS:
        shutil.rmtree(directory / name, ignore_errors=True)
    (directory / "chat_template.json").unlink(missing_ok=True)  # the older form, of processors
    config_file = directory / TOKENIZER_CONFIG
    config = read_json_object(config_file) if config_file.is_file() else {}
    if "chat_template" in config:
        del config["chat_template"]
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # newline="": keep the template's own line endings on every system.
    (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8", newline="")
