"""An exported folder carries the chat template that its student was trained with."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from lark_jax.config import Experiment, experiment_from_mapping
from lark_jax.finetuning import CHECKPOINTS
from lark_jax.stages import export as stage
from lark_jax.stages.layout import STUDENT, Layout
from lark_jax.students import load_student, random_student, read_architecture, save_new_student

OWN_TEMPLATE = (
    "{% for m in messages %}own {{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}own {% endif %}"
)
NEW_TEMPLATE = OWN_TEMPLATE.replace("own ", "new ")
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


@pytest.fixture
def student_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": OWN_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    save_new_student(random_student(read_architecture(folder), 0, "float32"), folder, tmp_path / "student")
    return tmp_path / "student"


def experiment_with(tmp_path: Path, student_folder: Path, template: Path | None) -> Experiment:
    student = {"path": str(student_folder), "chat_template": None if template is None else str(template)}
    stages = ("score", "select", "finetune", "export")
    pool = {"path": "pool.jsonl"}
    return experiment_from_mapping(
        {"workdir": str(tmp_path / "run"), "student": student, "pool": pool, "stages": stages}
    )


@pytest.mark.parametrize("given", [True, False])
def test_the_exported_student_has_the_template_of_the_experiment(
    given: bool, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "new.jinja"
    template.write_text(NEW_TEMPLATE)
    experiment = experiment_with(tmp_path, student_folder, template if given else None)
    # What fine-tuning would hand over, without training.
    result = SimpleNamespace(student=load_student(student_folder, dtype="float32")[0])
    monkeypatch.setattr(stage, "training_data", lambda *_: None)
    monkeypatch.setattr(stage, "finetuned", lambda *_, **__: result)
    layout = Layout.of(experiment)
    (layout.finetune(layout.runs[0]) / CHECKPOINTS).mkdir(parents=True)
    (task,) = stage.export_tasks(experiment, layout)
    task.run(tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / STUDENT)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == ("new x<end>" if given else "own x<end>")
    assert (tmp_path / "out" / STUDENT / "chat_template.jinja").exists() == given
    same_config = (tmp_path / "out" / STUDENT / "tokenizer_config.json").read_bytes() == (
        student_folder / "tokenizer_config.json"
    ).read_bytes()
    assert same_config == (not given)
