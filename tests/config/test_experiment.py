"""Every malformed configuration ends in one line that names the field; every valid one becomes an `Experiment`."""

import copy
import dataclasses
import math
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from lark_jax.config import Experiment, experiment_from_mapping
from lark_jax.errors import ConfigError
from lark_jax.recipe import paper_recipe

VALID: dict[str, Any] = {
    "workdir": "runs/x",
    "student": {"path": "checkpoint"},
    "pool": {"path": "pool.jsonl"},
    "stages": ("score", "select"),
}


def with_field(field: str, value: object) -> dict[str, Any]:
    values = copy.deepcopy(VALID)
    *sections, name = field.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
    target[name] = value
    return values


def error_line(values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        experiment_from_mapping(values)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("config.")
    return message


@pytest.mark.parametrize(
    ("field", "suggestion"),
    [
        ("workdri", "did you mean workdir?"),
        ("finetune.learning_rat", "did you mean finetune.learning_rate?"),
        ("select.budget", "did you mean select.budgets?"),
        ("evaluate.top_k", "did you mean evaluate.top_p?"),
        ("pool.zzz", "known fields: path, on_bad_record"),
    ],
)
def test_unknown_field_is_refused_with_the_nearest_name(field: str, suggestion: str) -> None:
    message = error_line(with_field(field, 1))
    assert f"{field}: unknown field" in message
    assert suggestion in message


@pytest.mark.parametrize("field", ["workdir", "student", "student.path", "pool.path"])
def test_missing_required_field_is_named(field: str) -> None:
    values = copy.deepcopy(VALID)
    *sections, name = field.split(".")
    target = values
    for section in sections:
        target = target[section]
    del target[name]
    assert error_line(values).startswith(
        f"config.{field}: missing; set it in the config file, or with --config.{field}="
    )


@pytest.mark.parametrize("field", ["workdir", "student.path", "pool.path"])
def test_a_required_field_that_the_recipe_leaves_empty_is_missing(field: str) -> None:
    assert error_line(with_field(field, "")).startswith(f"config.{field}: missing; ")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("finetune.learning_rate", "1e-5", "float"),
        ("finetune.batch_size", 64.0, "int"),
        ("finetune.batch_size", True, "int"),
        ("finetune.packing", 1, "bool"),
        ("student.path", 7, "str"),
        ("student.chat_template", 7, "str"),
        ("student", "checkpoint", "a section"),
        ("select.budgets", 3, "a tuple"),
        ("select.methods", "lark", "a tuple"),
        ("select.budgets", (1, "3"), "int"),
        ("seed", None, "int"),
        ("evaluate.seeds", (0, 1.5), "int"),
    ],
)
def test_wrong_type_is_refused_with_the_value_found(field: str, value: object, expected: str) -> None:
    message = error_line(with_field(field, value))
    assert message.startswith(f"config.{field}: expected {expected}")
    found = value[-1] if isinstance(value, tuple) else value
    assert repr(found) in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("stages", ()),
        ("stages", ("score", "train")),
        ("stages", ("score", "score")),
        ("finetune.lora_rank", -1),
        ("finetune.lora_alpha", 0.0),
        ("finetune.lora_targets", ()),
        ("finetune.lora_targets", ("q_proj", "q_proj")),
        ("student.max_length", 1),
        ("pool.on_bad_record", "ignore"),
        ("score.tokens_per_batch", 0),
        ("score.dtype", "float16"),
        ("score.vocab_chunk", -1),
        ("score.natural_context", -1),
        ("score.natural_split", "("),
        ("score.natural_split", r"[.!?]\s"),
        ("select.methods", ()),
        ("select.methods", ("lark", "lark")),
        ("select.budgets", ()),
        ("select.budgets", (0,)),
        ("select.budgets", (3, 3)),
        ("finetune.learning_rate", 0.0),
        ("finetune.learning_rate", math.nan),
        ("finetune.learning_rate", math.inf),
        ("finetune.warmup_fraction", 1.0),
        ("finetune.b2", 1.0),
        ("finetune.weight_decay", -0.1),
        ("finetune.checkpoint_every", 0),
        ("finetune.remat", "full"),
        ("finetune.attention", "flash"),
        ("evaluate.engine", "sglang"),
        ("evaluate.grader", "exact"),
        ("evaluate.samples", 0),
        ("evaluate.seeds", ()),
        ("evaluate.seeds", (1, 1)),
        ("evaluate.seeds", (-1,)),
        ("evaluate.temperature", -0.1),
        ("evaluate.temperature", math.inf),
        ("evaluate.temperature", math.nan),
        ("evaluate.top_p", 0.0),
        ("evaluate.top_p", 1.01),
        ("evaluate.repetition_penalty", 0.0),
        ("evaluate.repetition_penalty", math.inf),
        ("mesh.data", 0),
        ("synthetic.num_problems", 0),
        ("synthetic.pretrain_learning_rate", math.inf),
    ],
)
def test_value_out_of_range_is_refused_with_what_is_allowed(field: str, value: object) -> None:
    message = error_line(with_field(field, value))
    assert message.startswith(f"config.{field}: expected ")
    assert ", got " in message


def test_packed_rows_need_a_backend_that_keeps_trajectories_apart() -> None:
    values = with_field("finetune.attention", "cudnn")
    assert experiment_from_mapping(values).finetune.attention == "cudnn"
    values["finetune"]["packing"] = True
    assert error_line(values).startswith("config.finetune.attention: expected a backend that honours the segment ids")
    values["finetune"]["attention"] = "splash"
    assert experiment_from_mapping(values).finetune.packing


def test_fields_that_need_each_other() -> None:
    for given, missing in (("coordinator", "num_processes"), ("num_processes", "coordinator")):
        value = {"coordinator": "host:1", "num_processes": 2}[given]
        message = error_line(with_field(f"distributed.{given}", value))
        assert message == f"config.distributed.{missing}: expected a value, since {given} is given, got None"
    assert "config.select.weighting" in error_line(with_field("select.score", "g_hat"))
    assert "config.evaluate.benchmarks" in error_line({**VALID, "stages": ("evaluate",)})
    assert "config.synthetic" in error_line({**VALID, "stages": ("prepare", "score")})
    assert "config.synthetic.num_heads" in error_line(with_field("synthetic.hidden_size", 131))
    assert "config.evaluate.samples: expected 1 with temperature 0" in error_line(
        with_field("evaluate.temperature", 0.0)
    )
    greedy = experiment_from_mapping({**VALID, "evaluate": {"temperature": 0.0, "samples": 1}}).evaluate
    assert (greedy.temperature, greedy.samples) == (0.0, 1)


def test_minimal_configuration_takes_the_documented_defaults() -> None:
    experiment = experiment_from_mapping(VALID)
    assert (experiment.seed, experiment.student.max_length) == (42, 32_768)
    assert (experiment.evaluate.samples, experiment.evaluate.seeds) == (5, (0, 1, 2))
    assert (experiment.finetune.learning_rate, experiment.finetune.batch_size) == (1e-5, 64)
    assert experiment.synthetic is None


def test_lossless_conversions_are_made() -> None:
    experiment = experiment_from_mapping(
        {**VALID, "stages": ["score"], "evaluate": {"temperature": 1}, "select": {"budgets": [1, 5]}}
    )
    assert experiment.stages == ("score",)
    assert experiment.select.budgets == (1, 5)
    assert isinstance(experiment.evaluate.temperature, float)


def test_stages_may_be_one_string_with_commas_as_on_the_command_line() -> None:
    assert experiment_from_mapping({**VALID, "stages": ("score,select",)}).stages == ("score", "select")


def test_config_dict_with_placeholders_and_references_is_accepted() -> None:
    config = ConfigDict(VALID)
    config.student.chat_template = None
    config.evaluate = ConfigDict()
    config.evaluate.benchmarks = (config.get_oneway_ref("workdir") + "/benchmark.jsonl",)
    config.workdir = "elsewhere"
    experiment = experiment_from_mapping(config.to_dict())
    assert experiment.evaluate.benchmarks == ("elsewhere/benchmark.jsonl",)
    assert experiment.student.chat_template is None


def test_experiment_is_frozen_and_hashable() -> None:
    experiment = experiment_from_mapping(VALID)
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.seed = 1  # type: ignore[misc]
    assert hash(experiment) == hash(experiment_from_mapping(VALID))


def test_an_unknown_layer_for_an_adapter_is_refused_with_the_known_ones() -> None:
    message = error_line(with_field("finetune.lora_targets", ("q_proj", "lm_head")))
    assert message.startswith("config.finetune.lora_targets: ")
    assert message.endswith("got 'lm_head'")
    assert all(f"'{name}'" in message for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))


def from_command_line(*arguments: str) -> Experiment:
    """The paper's recipe with flags, parsed as an entry point does."""
    own_flags, command = flags.FlagValues(), ["run", "--config.workdir=runs/x", *arguments]
    command += ["--config.student.path=checkpoint", "--config.pool.path=pool.jsonl"]
    config_flags.DEFINE_config_dict("config", paper_recipe(), "", own_flags, sys_argv=command)
    own_flags(command)
    return experiment_from_mapping(own_flags["config"].value)


def test_a_tuple_is_emptied_on_the_command_line() -> None:
    found = from_command_line(
        "--config.stages=score,select",
        "--config.score.metrics=",
        "--config.finetune.loggers=",
        "--config.pool.exclude=",
        "--config.select.methods=",
        "--config.select.score=g_hat",
        "--config.select.weighting=chi2",
    )
    assert found.stages == ("score", "select")
    assert (found.score.metrics, found.finetune.loggers, found.pool.exclude, found.select.methods) == ((), (), (), ())


@pytest.mark.parametrize("field", ["stages", "select.budgets", "finetune.lora_targets", "evaluate.seeds"])
def test_a_tuple_that_needs_items_is_refused_when_the_command_line_empties_it(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.{field}: expected .* got \(\)"):
        from_command_line(f"--config.{field}=")


def test_a_comma_after_the_last_item_adds_none() -> None:
    found = from_command_line("--config.stages=score,select,", "--config.select.budgets=2,")
    assert (found.stages, found.select.budgets) == (("score", "select"), (2,))


def test_words_where_numbers_belong_are_refused_with_all_of_them() -> None:
    with pytest.raises(ConfigError, match=r"config\.evaluate\.seeds: expected ints, got '1', 'a'"):
        from_command_line("--config.evaluate.seeds=1,a")


def test_a_key_in_place_of_a_variable_or_an_address_is_not_repeated() -> None:
    message = error_line(with_field("evaluate.server_key_variable", "sk-secret"))
    assert message.startswith("config.evaluate.server_key_variable: expected the name of an environment variable")
    assert "secret" not in message
    server = {"engine": "openai", "server": "http://sk-secret@host/v1", "server_model": "student"}
    message = error_line({**VALID, "evaluate": {"benchmarks": ["own.json"], **server}})
    assert message.startswith("config.evaluate.server: expected http://HOST:PORT/v1")
    assert "secret" not in message


def test_an_empty_path_is_refused() -> None:
    message = error_line(with_field("evaluate.system_prompts", ""))
    assert message == "config.evaluate.system_prompts: expected a path, got an empty one"


def test_an_optional_value_is_taken_away_on_the_command_line() -> None:
    found = from_command_line("--config.evaluate.python=", "--config.student.chat_template=")
    assert (found.evaluate.python, found.student.chat_template) == (None, None)


def test_the_home_folder_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    values: dict[str, Any] = {
        "workdir": "~/runs",
        "student": {"path": "~/student", "chat_template": "~/chat.jinja"},
        "pool": {"path": "~/pool.jsonl", "file_names": "~{teacher}.json"},
        "score": {"judge": {"model": "~/judge", "prompt_file": "~/rubric.toml"}},
        "evaluate": {
            "python": "~/vllm/bin/python",
            "benchmarks": ("aime24", "~/own.json", "NAME=~/other.json", "owner/dataset~1", "a=b~/c"),
            "system_prompts": "~/prompts.json",
        },
    }
    found = experiment_from_mapping(values)
    assert (found.workdir, found.student.path, found.pool.path) == (
        "/home/me/runs",
        "/home/me/student",
        "/home/me/pool.jsonl",
    )
    assert (found.student.chat_template, found.evaluate.python) == ("/home/me/chat.jinja", "/home/me/vllm/bin/python")
    assert (found.score.judge.model, found.score.judge.prompt_file) == ("/home/me/judge", "/home/me/rubric.toml")
    assert found.evaluate.system_prompts == "/home/me/prompts.json"
    assert found.evaluate.benchmarks[1:3] == ("/home/me/own.json", "NAME=/home/me/other.json")
    assert (found.evaluate.benchmarks[0], *found.evaluate.benchmarks[3:]) == ("aime24", "owner/dataset~1", "a=b~/c")
    assert found.pool.file_names == "~{teacher}.json", "a pattern, not a path"
