"""Whatever a user hands over, the run ends in one clear line and a non-zero status, never in a bare traceback.

Each case breaks one thing of a small, valid experiment and says which words the line must contain. The checks behind
these lines are tested one by one beside their modules; here the whole way from the configuration is taken.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_jax.config import SyntheticConfig
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.run import EXIT_USER_ERROR, execute
from lark_jax.students import random_student, read_architecture, save_new_student

SMALL = SyntheticConfig(
    num_problems=3, num_test_problems=2, num_pretrain_problems=40, hidden_size=64, num_layers=1, num_heads=2
)


@dataclass
class Files:
    """A valid experiment on disk that a case may break."""

    folder: Path
    values: dict[str, Any]

    @property
    def pool(self) -> Path:
        return self.folder / "pool.jsonl"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    def edit_first_record(self, **changes: Any) -> None:
        lines = self.pool.read_text().splitlines()
        lines[0] = json.dumps({**json.loads(lines[0]), **changes})
        self.pool.write_text("\n".join(lines) + "\n")

    def edit_answer(self, text: str) -> None:
        messages = json.loads(self.pool.read_text().splitlines()[0])["messages"]
        self.edit_first_record(messages=[*messages[:-1], {"role": "assistant", "content": text}])

    def edit_json(self, name: str, **changes: Any) -> None:
        path = self.student / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def set_template(self, text: str) -> None:
        path = self.folder / "template.jinja"
        path.write_text(text)
        self.values["student"]["chat_template"] = str(path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    write_synthetic(SMALL, 3, folder / "data")
    blank = folder / "data" / "student"
    save_new_student(random_student(read_architecture(blank), 0, "float32"), blank, folder / "student")
    shutil.copy(folder / "data" / "pool.jsonl", folder / "pool.jsonl")
    shutil.copy(folder / "data" / "arithmetic.jsonl", folder / "benchmark.jsonl")
    return folder


@pytest.fixture
def files(valid: Path, tmp_path: Path) -> Files:
    folder = tmp_path / "inputs"
    shutil.copytree(valid, folder)
    values = {
        "workdir": str(tmp_path / "run"),
        "stages": ("score",),
        "student": {"path": str(folder / "student"), "max_length": 256},
        "pool": {"path": str(folder / "pool.jsonl")},
        "score": {"dtype": "float32", "tokens_per_batch": 512},
    }
    return Files(folder, values)


Break = Callable[[Files], None]
CASES: dict[str, tuple[Break, tuple[str, ...]]] = {}


def case(*words: str) -> Callable[[Break], Break]:
    def register(function: Break) -> Break:
        CASES[function.__name__] = (function, words)
        return function

    return register


# Configuration


@case("finetune.lerning_rate", "unknown field", "learning_rate")
def unknown_field(files: Files) -> None:
    files.values["finetune"] = {"lerning_rate": 1e-5}


@case("student.max_length", "int", "'long'")
def field_of_the_wrong_type(files: Files) -> None:
    files.values["student"]["max_length"] = "long"


@case("finetune.batch_size", ">= 1")
def field_out_of_range(files: Files) -> None:
    files.values["finetune"] = {"batch_size": 0}


@case("select.methods", "larc", "'lark'")
def unknown_method(files: Files) -> None:
    files.values["select"] = {"methods": ("larc",)}


@case("stages", "'train'")
def unknown_stage(files: Files) -> None:
    files.values["stages"] = ("train",)


@case("pool.path", "missing")
def missing_field(files: Files) -> None:
    files.values["pool"] = {}


@case("mesh", "devices")
def mesh_larger_than_the_machine(files: Files) -> None:
    files.values["mesh"] = {"data": 4096}


@case("evaluate.benchmarks")
def evaluation_without_a_benchmark(files: Files) -> None:
    files.values["stages"] = ("evaluate",)


@case("'score'", "config.stages")
def a_stage_whose_input_was_never_made(files: Files) -> None:
    files.values["stages"] = ("select",)


# Pool


@case("nowhere.jsonl")
def pool_file_missing(files: Files) -> None:
    files.values["pool"]["path"] = str(files.folder / "nowhere.jsonl")


@case(".csv", ".jsonl", ".json", ".parquet", ".arrow")
def pool_of_another_format(files: Files) -> None:
    files.pool.rename(files.folder / "pool.csv")
    files.values["pool"]["path"] = str(files.folder / "pool.csv")


@case("pool.jsonl")
def pool_empty(files: Files) -> None:
    files.pool.write_text("")


@case("pool.jsonl", "36")
def pool_line_truncated(files: Files) -> None:
    text = files.pool.read_text().splitlines()
    text[35] = text[35][:50]
    files.pool.write_text("\n".join(text))


@case("pool.jsonl", "1", "UTF-8")
def pool_in_another_encoding(files: Files) -> None:
    files.pool.write_bytes(files.pool.read_text().splitlines()[0].replace("a", "\u00e9").encode("latin-1"))


@case("pool.jsonl:1", "messages")
def record_without_messages(files: Files) -> None:
    files.edit_first_record(messages=None)


@case("pool.jsonl:1", "teacher")
def record_with_a_number_as_teacher(files: Files) -> None:
    files.edit_first_record(teacher=5)


@case("pool.jsonl:1", "problem_id")
def record_with_a_boolean_id(files: Files) -> None:
    files.edit_first_record(problem_id=True)


@case("pool.jsonl:1", "role", "tool")
def record_with_an_unknown_role(files: Files) -> None:
    files.edit_first_record(messages=[{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}])


@case("pool.jsonl:1", "assistant")
def record_that_ends_with_a_question(files: Files) -> None:
    files.edit_first_record(messages=[{"role": "user", "content": "x"}])


@case("pool.jsonl:1", "tool_calls")
def record_with_tool_calls(files: Files) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": []}]
    files.edit_first_record(messages=messages)


@case("pool.jsonl:2", "pool.jsonl:1")
def two_records_with_the_same_ids(files: Files) -> None:
    lines = files.pool.read_text().splitlines()
    files.pool.write_text("\n".join([lines[0], *lines]))


@case("pool.jsonl:2", "prompt")
def prompts_that_differ_between_candidates(files: Files) -> None:
    messages = json.loads(files.pool.read_text().splitlines()[0])["messages"]
    files.edit_first_record(messages=[{"role": "user", "content": "Another problem."}, messages[-1]])


@case("pool.parquet")
def parquet_truncated(files: Files) -> None:
    path = files.folder / "pool.parquet"
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in files.pool.read_text().splitlines()]), path)
    path.write_bytes(path.read_bytes()[:-100])
    files.values["pool"]["path"] = str(path)


@case("pool.parquet", "messages")
def parquet_with_text_for_messages(files: Files) -> None:
    path = files.folder / "pool.parquet"
    row = {"problem_id": "1", "candidate_id": "1", "teacher": "t", "messages": "hello"}
    pq.write_table(pa.Table.from_pylist([row]), path)
    files.values["pool"]["path"] = str(path)


def write_lists(files: Files) -> Path:
    """The pool as a JSON list per teacher, aligned by item; returns the first of the lists."""
    by_teacher: dict[str, list[Any]] = {}
    for line in files.pool.read_text().splitlines():
        record = json.loads(line)
        by_teacher.setdefault(record["teacher"], []).append({"messages": record["messages"]})
    folder = files.folder / "lists"
    for teacher, items in by_teacher.items():
        (folder / teacher).mkdir(parents=True)
        (folder / teacher / "gen1.json").write_text(json.dumps(items, indent=0))
    files.values["pool"]["path"] = str(folder)
    return folder / sorted(by_teacher)[0] / "gen1.json"


@case("gen1.json", "items", "item n of every file must answer problem n")
def list_with_fewer_problems_than_the_others(files: Files) -> None:
    path = write_lists(files)
    path.write_text(json.dumps(json.loads(path.read_text())[:1]))


@case("gen1.json", "item 0", "the prompt differs")
def lists_that_are_not_aligned(files: Files) -> None:
    path = write_lists(files)
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))


@case("config.pool.columns.answer", "'golden'", "problem_id, candidate_id")
def mapping_to_a_column_that_is_not_there(files: Files) -> None:
    files.values["pool"]["columns"] = {"answer": "golden"}


@case("pool.jsonl:1", "correct", "only_correct")
def filter_on_records_that_nobody_judged(files: Files) -> None:
    files.edit_first_record(correct=None)
    files.values["pool"]["only_correct"] = True


@case("config.pool.path", "no such file")
def folder_that_is_not_there_is_no_hub_id(files: Files) -> None:
    files.values["pool"]["path"] = str(files.folder / "nowhere")


@case("nobody/nothing", "Hugging Face hub", "HF_HUB_OFFLINE")
def hub_dataset_that_cannot_be_had(files: Files) -> None:
    files.values["pool"]["path"] = "nobody/nothing"


@case("none of", "could be scored")
def every_prompt_longer_than_the_limit(files: Files) -> None:
    files.values["student"]["max_length"] = 4


# Tokenizer and template


@case("tokenizer")
def tokenizer_missing(files: Files) -> None:
    (files.student / "tokenizer.json").unlink()


@case("tokenizer")
def tokenizer_corrupt(files: Files) -> None:
    (files.student / "tokenizer.json").write_text('{"version": "1.0"')


@case("student.chat_template")
def tokenizer_without_a_template(files: Files) -> None:
    config = json.loads((files.student / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (files.student / "tokenizer_config.json").write_text(json.dumps(config))
    (files.student / "chat_template.jinja").unlink(missing_ok=True)


@case("template")
def template_with_a_syntax_error(files: Files) -> None:
    files.set_template("{% for message in messages %}{{ message.content }}")


@case("template", "special token")
def template_without_an_end_of_turn_token(files: Files) -> None:
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    files.set_template(turns + "{% if add_generation_prompt %}assistant: {% endif %}")


@case("tokenizer", "vocab_size=100")
def tokenizer_of_another_student(files: Files) -> None:
    files.edit_json("config.json", vocab_size=100)


# Checkpoint


@case("nowhere")
def student_missing(files: Files) -> None:
    files.values["student"]["path"] = str(files.folder / "nowhere")


@case("config.json")
def student_without_config(files: Files) -> None:
    (files.student / "config.json").unlink()


@case("config.json")
def student_config_is_not_json(files: Files) -> None:
    (files.student / "config.json").write_text("{,}")


@case("model_type", "mamba")
def student_of_an_unknown_family(files: Files) -> None:
    files.edit_json("config.json", model_type="mamba")


@case("rope", "yarn")
def student_with_unsupported_rope_scaling(files: Files) -> None:
    files.edit_json("config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})


@case("safetensors")
def student_without_weights(files: Files) -> None:
    (files.student / "model.safetensors").unlink()


@case("safetensors", "pytorch_model.bin")
def student_with_pickled_weights_only(files: Files) -> None:
    (files.student / "model.safetensors").rename(files.student / "pytorch_model.bin")


@case("model.safetensors")
def student_weights_truncated(files: Files) -> None:
    path = files.student / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@case("model.layers.1")
def student_with_fewer_layers_than_its_config(files: Files) -> None:
    files.edit_json("config.json", num_hidden_layers=2)


@case("shape")
def student_with_another_width_than_its_config(files: Files) -> None:
    files.edit_json("config.json", intermediate_size=123)


def test_there_are_at_least_thirty_cases() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line_and_a_non_zero_status(name: str, files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    break_it, words = CASES[name]
    break_it(files)
    assert execute(files.values) == EXIT_USER_ERROR
    output = capfd.readouterr().err
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    for word in words:
        assert word in line, line


def test_the_unbroken_experiment_runs(files: Files) -> None:
    """Else every case above could fail for the same wrong reason."""
    assert execute(files.values) == 0


def test_a_missing_benchmark_is_found_before_anything_is_computed(
    files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {**files.values, "stages": ("score", "evaluate"), "evaluate": {"benchmarks": ("nowhere.json",)}}
    assert execute(values, only=("score",)) == EXIT_USER_ERROR
    assert "config.evaluate.benchmarks: nowhere.json: no such file" in capfd.readouterr().err
    assert not (Path(files.values["workdir"]) / "score").exists()


def test_finished_stages_survive_a_later_error(files: Files) -> None:
    assert execute(files.values) == 0
    scores = Path(files.values["workdir"]) / "score" / "scores.parquet"
    before = scores.read_bytes()
    assert execute({**files.values, "stages": ("score", "export")}) == EXIT_USER_ERROR
    assert scores.read_bytes() == before
