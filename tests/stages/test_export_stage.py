"""Export writes the student of the last checkpoint, with nothing but that, the source folder and the configuration."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from lark_jax.config import Experiment, FinetuneConfig, MeshConfig, experiment_from_mapping
from lark_jax.errors import PipelineError, TrainingError
from lark_jax.finetuning import CHECKPOINTS, Example, FinetuneResult, finetune
from lark_jax.finetuning.finished_run import RECORD
from lark_jax.finetuning.loop import run_step
from lark_jax.rendering.chat import RenderedTrajectory, render_trajectories, render_trajectory
from lark_jax.runtime.pipeline import MANIFEST, Outcome, Task, run_tasks
from lark_jax.runtime.sharding import make_mesh
from lark_jax.stages.export import export_tasks
from lark_jax.stages.layout import ADAPTER, STUDENT, Layout
from lark_jax.students import (
    export_adapter,
    export_student,
    load_student,
    random_student,
    read_architecture,
    save_new_student,
)

OWN_TEMPLATE = (
    "{% for m in messages %}own {{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}own {% endif %}"
)
NEW_TEMPLATE = OWN_TEMPLATE.replace("own ", "new ")
STEPS = 4  # with a checkpoint after every second
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


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    blank = folder / "config"
    blank.mkdir()
    (blank / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(blank / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": OWN_TEMPLATE}
    (blank / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    save_new_student(random_student(read_architecture(blank), 0, "float32"), blank, folder / "student")
    return folder / "student"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run and what it held in memory."""

    experiment: Experiment
    result: FinetuneResult

    def exported(self, directory: Path) -> None:
        layout = Layout.of(self.experiment)
        (task,) = export_tasks(self.experiment, layout)
        task.run(directory)

    @property
    def folder(self) -> Path:
        return self.result.directory


def trained(workdir: Path, student_folder: Path, seed: int = 0, template: Path | None = None, rank: int = 0) -> Trained:
    """Trains where the stage would; there is no pool, score table or selection."""
    experiment = experiment_from_mapping(
        {
            "workdir": str(workdir),
            "seed": seed,
            "student": {"path": str(student_folder), "chat_template": None if template is None else str(template)},
            "pool": {"path": "removed.jsonl"},
            "stages": ("score", "select", "finetune", "export"),
            "finetune": {"lora_rank": rank, "dtype": "float32", "epochs": STEPS, "checkpoint_every": 2},
        }
    )
    config: FinetuneConfig = dataclasses.replace(experiment.finetune, learning_rate=0.1)
    experiment = dataclasses.replace(experiment, finetune=config)
    layout = Layout.of(experiment)
    tokens = np.arange(2, 8, dtype=np.int32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    student, _ = load_student(student_folder, mesh=mesh, dtype="float32")
    rendered = RenderedTrajectory("p", "c", tokens[:2], tokens[2:], truncated=False)
    results: list[FinetuneResult] = []

    def train(directory: Path) -> Outcome:
        examples = [Example(rendered, weight=1.0)]
        results.append(finetune(student, examples, config, seed=seed, mesh=mesh, pad_id=0, directory=directory))
        return Outcome(counts={"steps": results[0].steps})

    run_tasks([Task("finetune", layout.finetune(layout.runs[0]), dict, train, scratch=(CHECKPOINTS,))])
    return Trained(experiment, results[0])


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes functions fail wherever a module of the package has them."""

    def forbid(*functions: Callable) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("export must not call this")

        modules = [module for name, module in list(sys.modules.items()) if name.startswith("lark_jax")]
        for function in functions:
            owners = [module for module in modules if getattr(module, function.__name__, None) is function]
            assert owners, function
            for module in owners:
                monkeypatch.setattr(module, function.__name__, refuse)

    return forbid


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_the_bytes_are_those_of_the_trained_student_without_rendering_loading_or_training(
    rank: int, student_folder: Path, tmp_path: Path, forbidden: Callable[..., None]
) -> None:
    run = trained(tmp_path / "run", student_folder, rank=rank)
    export_student(run.result.student, student_folder, tmp_path / "expected" / STUDENT, end_of_turn_id=1)
    if rank:
        export_adapter(run.result.student, str(student_folder), tmp_path / "expected" / ADAPTER)
    logged = run.result.metrics.read_bytes()
    forbidden(render_trajectory, render_trajectories, load_student, finetune, run_step)
    run.exported(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    weights = Path(STUDENT) / "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() != (student_folder / weights.name).read_bytes()
    assert run.result.metrics.read_bytes() == logged


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("finished"), student_folder)


def copy_of(finished: Trained, workdir: Path) -> Trained:
    shutil.copytree(finished.experiment.workdir, workdir)
    experiment = dataclasses.replace(finished.experiment, workdir=str(workdir))
    layout = Layout.of(experiment)
    return Trained(experiment, dataclasses.replace(finished.result, directory=layout.finetune(layout.runs[0])))


def test_deleted_checkpoints_are_named(finished: Trained, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    shutil.rmtree(run.folder / CHECKPOINTS)
    with pytest.raises(TrainingError, match="its checkpoints were deleted, so there is nothing to export"):
        run.exported(tmp_path / "out")
    assert not (run.folder / CHECKPOINTS).exists()


def test_a_damaged_checkpoint_is_refused_and_never_replaced_by_an_earlier_one(
    finished: Trained, tmp_path: Path
) -> None:
    run = copy_of(finished, tmp_path / "run")
    shutil.rmtree(run.folder / CHECKPOINTS / f"{STEPS}" / "state")
    with pytest.raises(TrainingError, match=f"{STEPS}: the checkpoint cannot be read .* delete this folder"):
        run.exported(tmp_path / "out")
    shutil.rmtree(run.folder / CHECKPOINTS / f"{STEPS}")
    missing = rf"the last step, {STEPS}, is missing \(the newest is of step 2\); delete .*{RECORD} and run the stage"
    with pytest.raises(TrainingError, match=missing):
        run.exported(tmp_path / "out")


def test_checkpoints_of_another_run_are_refused(finished: Trained, student_folder: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    other = trained(tmp_path / "other", student_folder, seed=1)
    shutil.rmtree(run.folder / CHECKPOINTS)
    shutil.copytree(other.folder / CHECKPOINTS, run.folder / CHECKPOINTS)
    with pytest.raises(TrainingError, match=r"belongs to another run: seed \(was 1, now 0\)"):
        run.exported(tmp_path / "out")


def test_a_run_that_is_not_complete_is_refused(finished: Trained, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    (run.folder / MANIFEST).unlink()
    with pytest.raises(PipelineError, match=r"add 'finetune' to config\.stages"):
        run.exported(tmp_path / "out")


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_record_is_refused(finished: Trained, tmp_path: Path, content: str) -> None:
    run = copy_of(finished, tmp_path / "run")
    (run.folder / RECORD).write_text(content)
    with pytest.raises(TrainingError, match="delete it and run the stage 'finetune' again"):
        run.exported(tmp_path / "out")


def test_a_run_of_a_release_without_the_record_is_exported(finished: Trained, tmp_path: Path) -> None:
    finished.exported(tmp_path / "expected")
    run = copy_of(finished, tmp_path / "run")
    (run.folder / RECORD).unlink()
    run.exported(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    shutil.rmtree(run.folder / CHECKPOINTS / f"{STEPS}")
    with pytest.raises(TrainingError, match=rf"the last step, {STEPS}, is missing .*; delete {run.folder} and run"):
        run.exported(tmp_path / "out")


@pytest.mark.parametrize("given", [True, False])
def test_the_exported_student_has_the_template_of_the_experiment(
    given: bool, finished: Trained, student_folder: Path, tmp_path: Path
) -> None:
    template = tmp_path / "new.jinja"
    template.write_text(NEW_TEMPLATE)
    student = dataclasses.replace(finished.experiment.student, chat_template=str(template) if given else None)
    run = dataclasses.replace(finished, experiment=dataclasses.replace(finished.experiment, student=student))
    run.exported(tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / STUDENT)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == ("new x<end>" if given else "own x<end>")
    assert (tmp_path / "out" / STUDENT / "chat_template.jinja").exists() == given
    same_config = (tmp_path / "out" / STUDENT / "tokenizer_config.json").read_bytes() == (
        student_folder / "tokenizer_config.json"
    ).read_bytes()
    assert same_config == (not given)
