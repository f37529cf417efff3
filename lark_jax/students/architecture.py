"""A checkpoint's `config.json` -> `Architecture`: everything that the decoder needs to know, checked.

A field that changes the computation and is not implemented is refused by name; nothing is guessed. What model families
differ in is data: see `families`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark_jax.errors import CheckpointError
from lark_jax.students.families import FAMILIES, Family


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies: HF's `rope_type` values "default", "linear" and "llama3"."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # this and the next two: "llama3" only
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class Architecture:
    """Shapes and constants of one decoder, under HF's `config.json` names where one exists."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool  # biases of the q, k and v projections (Qwen2)
    qk_norm: bool  # RMSNorm of every query and key head (Qwen3)
    sliding_window: int | None = None  # every layer sees that many positions, its own included; None: all (Mistral)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim={self.head_dim} is odd; rotary positions need an even head_dim")


# Fields that change what HF's classes compute -> the values that the decoder implements, HF's default first.
_ONLY_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "attention_dropout": (0.0, None),
    "pretraining_tp": (1, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
_REQUIRED_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_MISSING = object()


def read_architecture(path: str | Path) -> Architecture:
    """Reads `config.json` (`path` is the file or its folder).

    Raises:
      CheckpointError: the file is missing or not JSON, or a field is missing, malformed or unsupported.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: not found; a student needs a Hugging Face config.json")
    values = read_json_object(file)
    try:
        return architecture_from_config(values)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_json_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def architecture_from_config(values: Mapping[str, Any]) -> Architecture:
    """`read_architecture` for the parsed content of a `config.json` of transformers 4 or 5."""
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str):
        raise CheckpointError(f"model_type={model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    _refuse_unsupported_values(values, family)
    hidden_size = _positive_int(values, "hidden_size")
    num_heads = _positive_int(values, "num_attention_heads")
    max_position_embeddings = _positive_int(
        values, "max_position_embeddings", default=family.default_max_position_embeddings
    )
    rope_theta, rope_scaling = _rope(values)
    return Architecture(
        model_type=model_type,
        vocab_size=_positive_int(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive_int(values, "intermediate_size"),
        num_layers=_positive_int(values, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(values, family, num_heads),
        head_dim=_head_dim(values, family, hidden_size, num_heads),
        rms_norm_eps=_positive_float(values, "rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=_boolean(values, "tie_word_embeddings", default=False),
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(values, family, max_position_embeddings),
    )


def _refuse_unsupported_values(values: Mapping[str, Any], family: Family) -> None:
    for name, supported in _ONLY_SUPPORTED.items():
        _refuse_unless(name, values.get(name, supported[0]), supported)
    if not family.attention_bias:
        _refuse_unless("attention_bias", values.get("attention_bias", False), (False, None))
    for layer_type in _optional_list(values, "layer_types"):
        _refuse_unless("layer_types", layer_type, ("full_attention",))
    architectures = _optional_list(values, "architectures")
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise CheckpointError(f"architectures={architectures!r} is not supported; expected a ...ForCausalLM model")


def _refuse_unless(name: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        shown = str(value) if len(str(value)) < 80 else str(value)[:77] + "..."
        raise CheckpointError(f"{name}={shown} is not supported; supported: {supported[0]!r}")


def _sliding_window(values: Mapping[str, Any], family: Family, max_position_embeddings: int) -> int | None:
    if family.sliding_window_switch:
        _refuse_unless("use_sliding_window", values.get("use_sliding_window", False), (False, None))
        return None
    if values.get("sliding_window", family.default_sliding_window) is None:
        return None
    window = _positive_int(values, "sliding_window", default=family.default_sliding_window)
    if window >= max_position_embeddings:
        return None
    if not family.sliding_window:
        raise CheckpointError(
            f"sliding_window={window} is smaller than max_position_embeddings={max_position_embeddings}; windowed "
            "attention is not supported for this model_type (null or a window that covers every position is)"
        )
    return window


def _num_kv_heads(values: Mapping[str, Any], family: Family, num_heads: int) -> int:
    present = "num_key_value_heads" in values
    if (present and values["num_key_value_heads"] is None) or (not present and family.kv_heads_default_to_heads):
        return num_heads
    return _positive_int(values, "num_key_value_heads")


def _head_dim(values: Mapping[str, Any], family: Family, hidden_size: int, num_heads: int) -> int:
    if values.get("head_dim") is not None:
        return _positive_int(values, "head_dim")
    if family.default_head_dim is not None:
        return family.default_head_dim
    if hidden_size % num_heads:
        raise CheckpointError(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads} and head_dim is not given"
        )
    return hidden_size // num_heads


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """Base and scaling: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4)."""
    name = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    rope = values.get(name)
    rope = {} if rope is None else rope
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError(f"{name}={rope!r} is not supported; expected one flat object for all layers")
    theta_holder = rope if "rope_theta" in rope else values
    rope_theta = _positive_float(theta_holder, "rope_theta", default=10_000.0)
    _refuse_unless(f"{name}.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0, None))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _REQUIRED_ROPE_FIELDS:
        supported = ", ".join(_REQUIRED_ROPE_FIELDS)
        raise CheckpointError(f"{name}.rope_type={rope_type!r} is not supported; supported: {supported}")
    numbers: dict[str, Any] = {}
    for field in _REQUIRED_ROPE_FIELDS[rope_type]:
        is_length = field == "original_max_position_embeddings"
        numbers[field] = (_positive_int if is_length else _positive_float)(rope, field, prefix=f"{name}.")
    scaling = RopeScaling(rope_type=rope_type, **numbers)
    if rope_type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise CheckpointError(
            f"{name}.low_freq_factor={scaling.low_freq_factor} must be below high_freq_factor="
            f"{scaling.high_freq_factor}"
        )
    return rope_theta, scaling


def _lookup(values: Mapping[str, Any], name: str, default: Any, prefix: str) -> Any:
    value = values.get(name, default)
    if value is _MISSING:
        raise CheckpointError(f"{prefix}{name} is missing")
    return value


def _positive_int(values: Mapping[str, Any], name: str, default: Any = _MISSING, prefix: str = "") -> int:
    value = _lookup(values, name, default, prefix)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{prefix}{name}={value!r}: expected a positive integer")
    return value


def _positive_float(values: Mapping[str, Any], name: str, default: Any = _MISSING, prefix: str = "") -> float:
    value = _lookup(values, name, default, prefix)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise CheckpointError(f"{prefix}{name}={value!r}: expected a positive number")
    return float(value)


def _optional_list(values: Mapping[str, Any], name: str) -> list[Any]:
    value = values.get(name)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"{name}={value!r}: expected a list")
    return value or []


def _boolean(values: Mapping[str, Any], name: str, default: bool) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{name}={value!r}: expected true or false")
    return value
