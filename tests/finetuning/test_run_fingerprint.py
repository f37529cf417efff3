"""The fingerprint of a run names each input that changed."""

import dataclasses
from typing import Any

import pytest
from tiny_run import CONFIG, random_examples, tiny_student

from lark_jax.finetuning.run_fingerprint import FREE_FIELDS, deciding_settings, run_fingerprint

ADAPTED = dataclasses.replace(CONFIG, lora_rank=3, lora_alpha=5.0, lora_targets=("q_proj",))
INPUTS = {
    "student": tiny_student(),
    "examples": random_examples(7, 6, 3),
    "held_out": random_examples(8, 3, 1),
    "config": ADAPTED,
    "seed": 11,
}


def changed(config: dict[str, Any] | None = None, **inputs: Any) -> set[str]:
    """Names of what differs from the run of `INPUTS`."""
    before = run_fingerprint(**INPUTS)
    after = run_fingerprint(**{**INPUTS, "config": dataclasses.replace(ADAPTED, **(config or {})), **inputs})
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"seed": 12}, "seed"),
        ({"examples": random_examples(8, 6, 3)}, "training set"),
        ({"held_out": INPUTS["held_out"][1:]}, "held-out set"),
        ({"student": tiny_student(1)}, "initial weights"),
        ({"config": {"learning_rate": 2e-2}}, "finetune.learning_rate"),
        ({"config": {"evaluate_every": 7}}, "finetune.evaluate_every"),
        ({"config": {"lora_rank": 4}}, "finetune.lora_rank"),
        ({"config": {"lora_alpha": 6.0}}, "finetune.lora_alpha"),
        ({"config": {"lora_targets": ("q_proj", "o_proj")}}, "finetune.lora_targets"),
    ],
)
def test_a_changed_input_is_named(inputs: dict[str, Any], named: str) -> None:
    assert changed(**inputs) == {named}


def test_equal_inputs_have_equal_fingerprints_whatever_does_not_affect_the_weights() -> None:
    other = {"packing": True, "tokens_per_batch": 9, "checkpoint_every": 9, "loggers": ("wandb",), "remat": "block"}
    assert other.keys() <= set(FREE_FIELDS)
    assert changed(student=tiny_student(), examples=random_examples(7, 6, 3), config=other) == set()


def test_settings_without_effect_are_left_out() -> None:
    """When to measure without held-out data, and the adapter's fields without an adapter."""
    without = dataclasses.replace(CONFIG, evaluate_every=7, lora_alpha=3.0, lora_targets=("q_proj",))
    assert deciding_settings(without, holds_out=False) == deciding_settings(CONFIG, holds_out=False)
    assert deciding_settings(CONFIG, holds_out=False)["lora_rank"] == 0
    with_and_without = [
        run_fingerprint(tiny_student(), random_examples(7, 6, 3), (), config, 0)
        for config in (CONFIG, dataclasses.replace(CONFIG, evaluate_every=7))
    ]
    assert with_and_without[0] == with_and_without[1]
