"""TensorBoard and Weights & Biases: only when asked for, refused by name where they are not installed."""

import dataclasses
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_run import CONFIG, random_examples, run

from lark_jax.config import TRAINING_LOGGERS, experiment_from_mapping
from lark_jax.errors import ConfigError
from lark_jax.finetuning import LOGS, loggers, read_held_out, read_metrics
from lark_jax.finetuning.loggers import LOGGERS, require_installed
from lark_jax.finetuning.loop import CHECKPOINTS
from lark_jax.stages import check_paths

SHORT = dataclasses.replace(CONFIG, epochs=1, evaluate_every=3, checkpoint_every=3)  # 5 steps
HELD_OUT = random_examples(99, 2, 1)


class RecordingWandb(ModuleType):
    """Stands for the package: what a run would send, by project and run id."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = SimpleNamespace(name="wandb")  # type: ignore[assignment]
        self.starts: list[dict[str, Any]] = []
        self.sent: list[dict[str, float]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> "RecordingWandb":
        self.starts.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert (name, step_metric) in (("step", None), ("*", "step"))

    def log(self, values: dict[str, float]) -> None:
        self.sent.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_a_service_that_does_not_start_is_one_line_that_names_the_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithoutLogin(RecordingWandb):
        def init(self, **_: Any) -> "RecordingWandb":
            raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", WithoutLogin())
    (open_logger,) = loggers.loggers_of(("wandb",), "finetune", tmp_path, 0, {})
    with pytest.raises(ConfigError, match=r"config\.finetune\.loggers: 'wandb' cannot start: no API key configured"):
        open_logger()


def test_the_configuration_knows_the_same_loggers() -> None:
    assert set(TRAINING_LOGGERS) == set(LOGGERS)


def test_a_package_that_is_not_installed_is_named_with_its_command_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"config\.finetune\.loggers: 'wandb' .* pip install wandb"):
        run(tmp_path, dataclasses.replace(SHORT, loggers=("wandb",)))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "pool.jsonl").touch()
    values = {
        "workdir": str(tmp_path / "run"),
        "student": {"path": str(tmp_path)},
        "pool": {"path": str(tmp_path / "pool.jsonl")},
        "finetune": {"loggers": ("tensorboard",)},
        "stages": ("score", "finetune"),
    }
    with pytest.raises(ConfigError, match="pip install tensorboardX"):
        check_paths(experiment_from_mapping(values))
    check_paths(experiment_from_mapping({**values, "stages": ("score",)}))
    require_installed(())


@pytest.mark.parametrize("chosen", [("csv",), ("wandb", "wandb")])
def test_unknown_and_doubled_loggers_are_refused(chosen: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"config\.finetune\.loggers"):
        dataclasses.replace(CONFIG, loggers=chosen)


def test_wandb_gets_every_step_once_and_a_restart_continues_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(tmp_path, SHORT, held_out=HELD_OUT)
    assert wandb.starts == [], "the configuration does not name it"

    shutil.rmtree(tmp_path / CHECKPOINTS / "5")
    result = run(tmp_path, dataclasses.replace(SHORT, loggers=("wandb",)), held_out=HELD_OUT)  # steps 4 and 5
    (start,) = wandb.starts
    assert (start["project"], start["name"], start["resume"]) == ("mine", "finetune", "allow")
    assert start["config"]["finetune.batch_size"] == 4
    metrics, held_out = read_metrics(result.metrics), read_held_out(result.held_out)
    assert [values["step"] for values in wandb.sent] == [4, 5, 5]
    assert wandb.sent[1]["train/loss"] == metrics[4].loss
    assert wandb.sent[1]["speed/tokens_per_second"] > 0
    assert wandb.sent[2] == {"step": 5, "held_out/loss": held_out[-1].loss}
    assert wandb.finished == 1

    shutil.rmtree(tmp_path / CHECKPOINTS / "5")
    run(tmp_path, dataclasses.replace(SHORT, loggers=("wandb",)), held_out=HELD_OUT)
    assert wandb.starts[1]["id"] == start["id"]
    run(tmp_path, dataclasses.replace(SHORT, loggers=("wandb",)), held_out=HELD_OUT)
    assert len(wandb.starts) == 2, "a finished run has nothing to log"


def test_tensorboard_has_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    result = run(tmp_path, dataclasses.replace(SHORT, loggers=("tensorboard",)), held_out=HELD_OUT)
    found: dict[str, dict[int, float]] = {}
    for path in (tmp_path / LOGS / "tensorboard").iterdir():
        for record in _records(path.read_bytes()):
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    metrics = read_metrics(result.metrics)
    assert found["train/loss"] == pytest.approx({m.step: m.loss for m in metrics})
    assert found["train/grad_norm"] == pytest.approx({m.step: m.grad_norm for m in metrics})
    assert found["held_out/loss"] == pytest.approx({m.step: m.loss for m in read_held_out(result.held_out)})
    assert set(found["speed/tokens_per_second"]) == {1, 2, 3, 4, 5}


def _records(data: bytes) -> list[bytes]:
    """TensorFlow's record format: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    records = []
    while data:
        length = int.from_bytes(data[:8], "little")
        records.append(data[12 : 12 + length])
        data = data[16 + length :]
    return records
