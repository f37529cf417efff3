import filecmp
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from hf_families import FAMILIES
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from lark_jax.config import MeshConfig
from lark_jax.errors import CheckpointError
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students import export_student, load_student, random_student, save_new_student
from lark_jax.students.parameters import flatten_parameters, replace_parameters


def raw_tensors(folder):
    """File -> key -> (dtype, shape, bytes), parsed without our code."""
    return {
        file.name: {
            key: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
            for key, entry in safetensors.deserialize(file.read_bytes())
        }
        for file in sorted(folder.glob("*.safetensors"))
    }


def nudged(student):
    """The student with other weights, as after training."""
    graph, state = nnx.split(student)
    values = {name: value + 0.01 for name, value in flatten_parameters(state).items()}
    return nnx.merge(graph, replace_parameters(state, values))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "max_shard_size"), [("float32", "1GB"), ("bfloat16", "50KB")])
def test_import_then_export_gives_identical_bytes(family, dtype, max_shard_size, make_checkpoint, tmp_path):
    source = make_checkpoint(family, dtype=dtype, max_shard_size=max_shard_size)
    student, _ = load_student(source, dtype="float32")
    export_student(student, source, tmp_path / "out")
    before, after = raw_tensors(source), raw_tensors(tmp_path / "out")
    assert (len(before) > 1) == (max_shard_size != "1GB")
    assert before == after
    same, different, absent = filecmp.cmpfiles(
        source, tmp_path / "out", [file.name for file in source.iterdir()], shallow=False
    )
    assert (different, absent) == ([], [])
    assert "config.json" in same


def test_export_from_a_mesh_keeps_every_tensor(make_checkpoint, tmp_path):
    source = make_checkpoint("qwen2-tied", hidden_size=64, num_attention_heads=4, dtype="bfloat16")
    student, _ = load_student(source, mesh=make_mesh(MeshConfig()), dtype="bfloat16")
    export_student(student, source, tmp_path / "out")
    assert raw_tensors(source) == raw_tensors(tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen2-tied", "llama3"])
def test_exported_student_gives_the_same_logits_in_transformers(family, make_checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = make_checkpoint(family)
    student = nudged(load_student(source, dtype="float32")[0])
    export_student(student, source, tmp_path / "out", end_of_turn_id=5)
    tokens = np.random.default_rng().integers(0, 307, (2, 50))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        reference = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(student.logits(jnp.asarray(tokens)), reference, rtol=0, atol=2e-4)
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        assert np.abs(original(torch.tensor(tokens)).logits.numpy() - reference).max() > 0.01
    assert 5 in model.generation_config.eos_token_id


def test_a_repeated_tied_head_and_old_buffers_are_written_again(make_checkpoint, tmp_path):
    source = make_checkpoint("qwen2-tied")
    file = source / "model.safetensors"
    tensors = load_file(file)
    buffer_key = "model.layers.1.self_attn.rotary_emb.inv_freq"
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"], buffer_key: np.arange(6, dtype=np.float32)}
    save_file(tensors, file)
    student = nudged(load_student(source, dtype="float32")[0])
    export_student(student, source, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert set(exported) == set(tensors)
    np.testing.assert_array_equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
    np.testing.assert_array_equal(exported["lm_head.weight"], tensors["lm_head.weight"] + np.float32(0.01))
    np.testing.assert_array_equal(exported[buffer_key], tensors[buffer_key])


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({"eos_token_id": 2, "temperature": 0.7}, {"eos_token_id": [2, 9], "temperature": 0.7}),
        ({"eos_token_id": [3, 9]}, {"eos_token_id": [3, 9]}),
        ({"top_k": 4, "_from_model_config": True}, {"top_k": 4, "eos_token_id": [1, 9]}),
        (None, {"eos_token_id": [1, 9]}),
    ],
)
def test_generation_stops_at_the_end_of_turn_too(before, expected, make_checkpoint, tmp_path):
    source = make_checkpoint("qwen3", num_hidden_layers=1, eos_token_id=1)
    (source / "generation_config.json").unlink(missing_ok=True)
    if before is not None:
        (source / "generation_config.json").write_text(json.dumps(before))
    student, _ = load_student(source, dtype="float32")
    export_student(student, source, tmp_path / "out", end_of_turn_id=9)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == expected


def test_tokenizer_and_template_are_copied_and_other_weights_are_not(make_checkpoint, tmp_path):
    source = make_checkpoint("qwen3", num_hidden_layers=1)
    copied = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}\r\n", "merges.txt": b"a b", "LICENSE": b"MIT"}
    for name, content in copied.items():
        (source / name).write_bytes(content)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "consolidated.safetensors").write_bytes(b"other")
    student, _ = load_student(source, dtype="float32")
    export_student(student, source, tmp_path / "out")
    for name, content in copied.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


NEW_TEMPLATE = "{% for m in messages %}<new>{{ m['content'] }}<end>\n{% endfor %}\r\n"
OLD_TEMPLATE = "<old>{{ messages[0]['content'] }}"


def add_tokenizer(folder, **config):
    """A word-level tokenizer that transformers loads, with `config` in its tokenizer_config.json."""
    words = ["<unk>", "<new>", "<old>", "<end>", "Straße"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "comment": "Straße"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=4, ensure_ascii=False), encoding="utf-8")


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({}, {}),
        ({"chat_template": OLD_TEMPLATE}, {}),
        ({"chat_template": [{"name": "default", "template": OLD_TEMPLATE}]}, {}),
        ({}, {"chat_template.jinja": OLD_TEMPLATE, "additional_chat_templates/default.jinja": OLD_TEMPLATE}),
        ({}, {"chat_template.json": json.dumps({"chat_template": OLD_TEMPLATE})}),
    ],
    ids=["none", "in the configuration", "several in the configuration", "files", "processor's file"],
)
def test_a_given_template_is_the_only_one_of_the_exported_folder(config, files, make_checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = make_checkpoint("qwen3", num_hidden_layers=1)
    add_tokenizer(source, **config)
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    student, _ = load_student(source, dtype="float32")
    export_student(student, source, tmp_path / "out", chat_template=NEW_TEMPLATE)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == NEW_TEMPLATE.replace("\r\n", "\n")  # transformers reads in text mode
    message = {"role": "user", "content": "Straße"}
    assert tokenizer.apply_chat_template([message], tokenize=False).rstrip() == "<new>Straße<end>"
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == NEW_TEMPLATE.encode()
    assert not any("<old>" in file.read_text() for file in (tmp_path / "out").rglob("*template*") if file.is_file())

    before = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    after = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert after == {name: value for name, value in before.items() if name != "chat_template"}
    kept = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    kept |= set() if "chat_template" in config else {"tokenizer_config.json"}
    _, different, absent = filecmp.cmpfiles(source, tmp_path / "out", kept, shallow=False)
    assert (different, absent) == ([], [])


def test_named_templates_are_copied_when_none_is_given(make_checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = make_checkpoint("qwen3", num_hidden_layers=1)
    add_tokenizer(source)
    (source / "chat_template.jinja").write_text(OLD_TEMPLATE)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(NEW_TEMPLATE)
    student, _ = load_student(source, dtype="float32")
    export_student(student, source, tmp_path / "out")
    loaded = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out")]
    assert loaded[1].chat_template == loaded[0].chat_template
    assert set(loaded[1].chat_template) == {"default", "tool_use"}


def test_a_failed_export_leaves_nothing_behind(make_checkpoint, tmp_path):
    source = make_checkpoint("qwen3", num_hidden_layers=1)
    student, _ = load_student(source, dtype="float32")
    with pytest.raises(CheckpointError, match="is the source checkpoint"):
        export_student(student, source, source)
    (source / "generation_config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not valid JSON"):
        export_student(student, source, tmp_path / "out", end_of_turn_id=9)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_a_source_of_another_architecture(make_checkpoint, tmp_path):
    student, _ = load_student(make_checkpoint("qwen3", num_hidden_layers=1), dtype="float32")
    with pytest.raises(CheckpointError, match="an architecture that differs"):
        export_student(student, make_checkpoint("qwen3", num_hidden_layers=2), tmp_path / "out")


def test_a_new_student_is_saved_and_read_back(make_checkpoint, tmp_path):
    blank = make_checkpoint("qwen2-tied")
    (blank / "tokenizer.json").write_text("{}")
    _, architecture = load_student(blank, dtype="float32")
    (blank / "model.safetensors").unlink()
    student = random_student(architecture, 1, "float32")
    save_new_student(student, blank, tmp_path / "out")
    loaded = flatten_parameters(nnx.state(load_student(tmp_path / "out", dtype="float32")[0]))
    for name, value in flatten_parameters(nnx.state(student)).items():
        np.testing.assert_array_equal(value, loaded[name])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match="an architecture that differs"):
        save_new_student(student, make_checkpoint("qwen3"), tmp_path / "other")
