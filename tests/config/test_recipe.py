"""The paper's recipe: the defaults, the few values that differ, and the types that the command line goes by."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from ml_collections import ConfigDict

from lark_jax.config import experiment_from_mapping
from lark_jax.recipe import paper_recipe

PATHS = {"workdir": "runs/x", "student.path": "checkpoint", "pool.path": "pool.jsonl"}
DIFFERENT = {
    "select.methods": ("lark", "random", "grape"),
    "select.budgets": (1, 3),
    "evaluate.engine": "vllm",
    "evaluate.benchmarks": ("aime24", "amc83", "gpqa_diamond", "math500"),
    "evaluate.repetition_penalty": 1.1,
}
# Literal values of the paper: Appendix C.3 (fine-tuning) and C.4 (decoding).
PAPER = {
    "seed": 42,
    "student.max_length": 32768,
    "finetune.learning_rate": 1.0e-5,
    "finetune.epochs": 5,
    "finetune.batch_size": 8 * 1 * 8,  # GPUs x per-device batch x gradient accumulation
    "finetune.warmup_fraction": 0.05,
    "finetune.max_grad_norm": 1.0,
    "finetune.b1": 0.9,
    "finetune.b2": 0.999,
    "finetune.eps": 1e-8,
    "finetune.weight_decay": 0.0,
    "finetune.dtype": "bfloat16",
    "finetune.remat": "block",
    "evaluate.samples": 5,
    "evaluate.seeds": (0, 1, 2),
    "evaluate.temperature": 0.6,
    "evaluate.top_p": 0.95,
    "evaluate.max_tokens": 32768,
    "evaluate.tensor_parallel": 1,
}


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def with_paths() -> ConfigDict:
    config = paper_recipe()
    config.update_from_flattened_dict(PATHS)
    return config


def test_the_recipe_is_the_papers() -> None:
    recipe = dict(leaves(dataclasses.asdict(experiment_from_mapping(with_paths()))))
    assert {field: recipe[field] for field in PAPER} == PAPER


def test_it_has_every_field_with_its_default_but_for_the_few_that_differ() -> None:
    evaluate = {"benchmarks": ("own.json",)}  # needed, since the default stages evaluate
    minimal = experiment_from_mapping(
        {"workdir": "runs/x", "student": {"path": "s"}, "pool": {"path": "p"}, "evaluate": evaluate}
    )
    defaults = dict(leaves(dataclasses.asdict(minimal)))
    recipe = dict(leaves(paper_recipe().to_dict()))
    assert recipe.keys() == defaults.keys() - {"synthetic"}
    found = {field: value for field, value in recipe.items() if value != defaults[field]}
    assert found == {**DIFFERENT, **dict.fromkeys(PATHS, "")}


@pytest.mark.parametrize(
    ("field", "right", "wrong"),
    [
        ("student.chat_template", "chat.jinja", 7),
        ("pool.columns.prompt", "question", 7),
        ("score.judge.requests_per_minute", 2.5, "often"),
        ("evaluate.engines", 2, "two"),
        ("distributed.process_id", 1, 0.5),
        ("finetune.lora_targets", ("q_proj",), "q_proj"),
        ("finetune.epochs", 3, 0.5),
    ],
)
def test_every_value_has_the_type_that_its_field_declares(field: str, right: object, wrong: object) -> None:
    """The command line parses an override by the type of the value that it replaces, also where that is None."""
    config = paper_recipe()
    config.update_from_flattened_dict({field: right})
    with pytest.raises(TypeError):
        config.update_from_flattened_dict({field: wrong})


def test_the_synthetic_section_is_absent_until_a_config_file_adds_it() -> None:
    config = with_paths()
    assert "synthetic" not in config
    config.synthetic = ConfigDict({"rollouts": 7})
    synthetic = experiment_from_mapping(config).synthetic
    assert synthetic is not None
    assert (synthetic.rollouts, synthetic.num_problems) == (7, 200)
