"""Every broken checkpoint raises one clear line that names the file or field."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lark_jax.errors import CheckpointError
from lark_jax.students import load_student
from lark_jax.students.families import FAMILIES

SIZES = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
SHAPES = {
    "embed_tokens.weight": (13, 8),
    "norm.weight": (8,),
    "layers.0.input_layernorm.weight": (8,),
    "layers.0.post_attention_layernorm.weight": (8,),
    "layers.0.self_attn.q_proj.weight": (8, 8),
    "layers.0.self_attn.q_proj.bias": (8,),
    "layers.0.self_attn.k_proj.weight": (4, 8),
    "layers.0.self_attn.k_proj.bias": (4,),
    "layers.0.self_attn.v_proj.weight": (4, 8),
    "layers.0.self_attn.v_proj.bias": (4,),
    "layers.0.self_attn.o_proj.weight": (8, 8),
    "layers.0.mlp.gate_proj.weight": (6, 8),
    "layers.0.mlp.up_proj.weight": (6, 8),
    "layers.0.mlp.down_proj.weight": (8, 6),
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def write_checkpoint(folder, num_shards=0, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, **config}))
    rng = np.random.default_rng()
    tensors = {f"model.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    if not num_shards:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    keys = sorted(tensors)
    weight_map = {key: f"model-{i % num_shards}.safetensors" for i, key in enumerate(keys)}
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in keys if weight_map[key] == name}, folder / name)
    write_index(folder, weight_map)
    return folder


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        load_student(folder, dtype="float32")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("num_shards", [0, 3])
def test_the_unbroken_checkpoint_loads(num_shards, tmp_path):
    _, architecture = load_student(write_checkpoint(tmp_path / "good", num_shards), dtype="float32")
    assert architecture.head_dim == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma2"}, f"model_type='gemma2' is not supported; supported: {', '.join(sorted(FAMILIES))}"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"model_type": ["qwen2"]}, "model_type=['qwen2'] is not supported"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "expected a ...ForCausalLM model"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported; supported: 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types=sliding_attention is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config={'quant_method': 'awq'} is not"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type='yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type='dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "expected one flat object for all layers"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {**LLAMA3}}, "rope_scaling.original_max_position_embeddings is missing"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64, "low_freq_factor": 4.0}},
            "low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        ({"rope_theta": -1.0}, "rope_theta=-1.0: expected a positive number"),
        ({"hidden_size": "8"}, "hidden_size='8': expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected a positive integer"),
        ({"vocab_size": True}, "vocab_size=True: expected a positive integer"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': expected true or false"),
        ({"num_attention_heads": 3}, "hidden_size=8 is not a multiple of num_attention_heads=3"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=True is not supported"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True is not supported"),
        (
            {"model_type": "llama", "sliding_window": 4096, "max_position_embeddings": 32768},
            "sliding_window=4096 is smaller than max_position_embeddings=32768",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0: expected a positive integer"),
        ({"model_type": "mistral", "sliding_window": "all"}, "sliding_window='all': expected a positive integer"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures='Qwen2ForCausalLM': expected a list"),
        ({"rope_scaling": {"rope_type": []}}, "rope_scaling.rope_type=[] is not supported"),
        ({"layer_types": 3}, "layer_types=3: expected a list"),
        ({"tie_word_embeddings": False}, "1 missing (lm_head.weight)"),
        ({"num_hidden_layers": 2}, "12 missing (model.layers.1.input_layernorm.weight"),
        ({"vocab_size": 14}, "1 of the wrong shape (model.embed_tokens.weight [13, 8] instead of [14, 8])"),
        ({"model_type": "llama"}, "3 unexpected (model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_config_is_refused_by_field(config, message, tmp_path):
    folder = write_checkpoint(tmp_path / "student", **config)
    assert message in (refused := refusal(folder))
    assert str(folder) in refused


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads"])
def test_a_missing_size_is_named(field, tmp_path):
    folder = write_checkpoint(tmp_path / "student")
    (folder / "config.json").write_text(json.dumps({key: value for key, value in SIZES.items() if key != field}))
    assert f"{field} is missing" in refusal(folder)


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def emptied(folder):
    (folder / "model.safetensors").write_bytes(b"")


def overwritten(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def integer_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": np.ones(8, np.int8)}, folder / "model.safetensors")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def without_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "qwen2",')


def config_list(folder):
    (folder / "config.json").write_text("[]")


def binary_config(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"model\.safetensors: not a readable safetensors file, perhaps truncated"),
        (emptied, r"model\.safetensors: not a readable safetensors file"),
        (overwritten, r"model\.safetensors: not a readable safetensors file"),
        (integer_weights, r"tensor model\.norm\.weight has dtype I8; supported: F32, F16, BF16"),
        (pickled, r"pytorch_model\.bin is a pickle.*convert it to model\.safetensors"),
        (without_weights, r"holds neither model\.safetensors nor model\.safetensors\.index\.json"),
        (without_config, r"config\.json: not found"),
        (broken_config, r"config\.json: not valid JSON"),
        (config_list, r"config\.json: expected a JSON object, got list"),
        (binary_config, r"config\.json: not valid JSON"),
    ],
)
def test_damaged_file_is_named(damage, message, tmp_path):
    folder = write_checkpoint(tmp_path / "student")
    damage(folder)
    assert re.search(message, refusal(folder))


def missing_shard(folder):
    (folder / "model-1.safetensors").unlink()


def truncated_shard(folder):
    file = folder / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def tensor_in_two_shards(folder):
    tensors = load_file(folder / "model-0.safetensors")
    file = folder / "model-1.safetensors"
    save_file({**load_file(file), next(iter(tensors)): next(iter(tensors.values()))}, file)


def tensor_in_another_shard(folder):
    weight_map = read_index(folder)
    weight_map["model.norm.weight"] = next(
        name for name in weight_map.values() if name != weight_map["model.norm.weight"]
    )
    write_index(folder, weight_map)


def tensor_in_no_shard(folder):
    write_index(folder, {**read_index(folder), "model.extra": "model-0.safetensors"})


def index_out_of_the_folder(folder):
    write_index(folder, {**read_index(folder), "model.extra": "../model-0.safetensors"})


def index_without_map(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, r"1 shard\(s\) not found: model-1\.safetensors"),
        (truncated_shard, r"model-2\.safetensors: not a readable safetensors file"),
        (tensor_in_two_shards, r"is also stored in model-0\.safetensors|lists model-0\.safetensors"),
        (tensor_in_another_shard, r"holds tensor model\.norm\.weight, which model\.safetensors\.index\.json lists"),
        (tensor_in_no_shard, r"1 listed tensor\(s\) are in no shard: model\.extra"),
        (index_out_of_the_folder, r"weight_map must map tensor names to file names in the same folder"),
        (index_without_map, r"not a valid index with a weight_map"),
    ],
)
def test_inconsistent_shards_are_named(damage, message, tmp_path):
    folder = write_checkpoint(tmp_path / "student", num_shards=3)
    damage(folder)
    assert re.search(message, refusal(folder))
