"""FLOPs of windows against a count of what each layer computes, token by token."""

import numpy as np
import pytest

from lark_jax.scoring.local_naturalness.cost import one_pass_flops, window_flops
from lark_jax.scoring.local_naturalness.work import Sizes
from lark_jax.students.architecture import architecture_from_config

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 70,
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("context", [0, 1, 3])
def test_flops_are_those_of_every_token_of_every_window(context: int) -> None:
    architecture = architecture_from_config(CONFIG)
    rng = np.random.default_rng()
    steps, prompt = rng.integers(1, 6, 7), int(rng.integers(1, 9))
    into_attention, out_of_it = 24 * (24 + 8 + 8), 24 * 24 + 3 * 24 * 52
    products = 0
    for last in range(min(context, 6), 7):
        first = last - context if last > context else 0
        size, scored = steps[first : last + 1].sum(), steps[last] if last > context else steps[: last + 1].sum()
        for token in range(size):
            products += 3 * (into_attention + 2 * 24 * (prompt - 1 + token + 1))
            products += (3 if token >= size - scored else 2) * out_of_it
        products += scored * 70 * 24
    assert window_flops(architecture, Sizes(prompt, steps), context) == pytest.approx(2 * products)


def test_a_trajectory_of_few_steps_costs_its_one_pass_without_the_prompt() -> None:
    architecture = architecture_from_config(CONFIG)
    size = Sizes(1, np.array([3, 4, 2]))
    assert window_flops(architecture, size, 4) == pytest.approx(one_pass_flops(architecture, size))
