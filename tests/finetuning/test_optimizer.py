import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.config import FinetuneConfig
from lark_jax.finetuning.optimizer import (
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    warmup_cosine,
    warmup_steps,
)


@given(peak=st.floats(1e-7, 1e-2), total=st.integers(1, 400), fraction=st.one_of(st.just(0.0), st.floats(1e-3, 0.999)))
def test_schedule_equals_the_closed_form_in_float64(peak: float, total: int, fraction: float) -> None:
    warmup = math.ceil(total * fraction)
    steps = np.arange(total)
    falling = 0.5 * (1 + np.cos(math.pi * (steps - warmup) / max(1, total - warmup)))
    expected = peak * np.where(steps < warmup, steps / max(1, warmup), falling)
    config = FinetuneConfig(learning_rate=peak, warmup_fraction=fraction)
    actual = learning_rate_schedule(config, total)(jnp.arange(total))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * peak)


@pytest.mark.parametrize(("total", "warmup"), [(20, 1), (20, 0), (781, 40), (1, 1), (7, 7)])
def test_schedule_is_that_of_transformers(total: int, warmup: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    expected = []
    for _ in range(total):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(warmup_cosine(3e-4, warmup, total)(jnp.arange(total)), expected, rtol=1e-5, atol=1e-10)


def test_warmup_is_rounded_up() -> None:
    assert [warmup_steps(total, 0.05) for total in (1, 20, 21, 400)] == [1, 1, 2, 20]
    assert warmup_steps(100, 0.0) == 0


def test_updates_equal_adamw_written_out_in_float64() -> None:
    config = FinetuneConfig(
        learning_rate=3e-3, warmup_fraction=0.2, max_grad_norm=0.7, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1
    )
    total_steps = 12
    rng = np.random.default_rng()
    values = {"layers.mlp.up_proj.weight": rng.normal(size=(5, 3)), "norm.weight": rng.normal(size=4)}
    gradients = [{name: rng.normal(size=value.shape) for name, value in values.items()} for _ in range(total_steps)]

    optimizer = make_optimizer(config, total_steps)
    parameters = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    state = optimizer.init(parameters)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, parameters)
        parameters = optax.apply_updates(parameters, updates)

    expected = _adamw_float64(values, gradients, config, total_steps)
    for name, value in parameters.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def _adamw_float64(
    values: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]], config: FinetuneConfig, total_steps: int
) -> dict[str, np.ndarray]:
    warmup = math.ceil(total_steps * config.warmup_fraction)
    first = {name: np.zeros_like(value) for name, value in values.items()}
    second = {name: np.zeros_like(value) for name, value in values.items()}
    values = dict(values)
    for step, gradient in enumerate(gradients):
        progress = (step - warmup) / (total_steps - warmup)
        scale = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradient.values()))
        clip = min(1.0, config.max_grad_norm / norm)
        for name in values:
            g = clip * gradient[name]
            first[name] = config.b1 * first[name] + (1 - config.b1) * g
            second[name] = config.b2 * second[name] + (1 - config.b2) * g * g
            mean = first[name] / (1 - config.b1 ** (step + 1))
            deviation = np.sqrt(second[name] / (1 - config.b2 ** (step + 1)))
            decay = 0.0 if name.endswith("norm.weight") else config.weight_decay
            rate = config.learning_rate * scale
            values[name] = values[name] - rate * (mean / (deviation + config.eps) + decay * values[name])
    return values


def test_gradients_below_the_limit_are_not_scaled() -> None:
    config = FinetuneConfig(warmup_fraction=0.0, max_grad_norm=1e3, eps=1.0)
    gradient = {"norm.weight": jnp.array([3.0, -4.0])}
    loose = make_optimizer(config, 10)
    looser = make_optimizer(dataclasses.replace(config, max_grad_norm=1e6), 10)
    updates = [o.update(gradient, o.init(gradient), gradient)[0]["norm.weight"] for o in (loose, looser)]
    np.testing.assert_array_equal(*updates)


def test_weight_decay_skips_biases_and_norms() -> None:
    names = ("embed_tokens.weight", "layers.self_attn.q_proj.bias", "layers.input_layernorm.weight", "norm.weight")
    parameters = {name: jnp.zeros(1) for name in (*names, "layers.self_attn.q_norm.weight", "lm_head.weight")}
    decayed = {name for name, decays in decay_mask(parameters).items() if decays}
    assert decayed == {"embed_tokens.weight", "lm_head.weight"}
