"""AdamW under a cosine schedule with linear warm-up, after clipping by the global norm (paper, Appendix C.3)."""

import math

import jax
import jax.numpy as jnp
import optax

from lark_jax.config import FinetuneConfig

Parameters = dict[str, jax.Array]


def make_optimizer(config: FinetuneConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of the paper's trainer; state and updates have the dtype of the parameters.

    AdamW is that of torch.optim.AdamW (decoupled decay, epsilon outside the square root). As in the Hugging Face
    Trainer, weight decay does not apply to biases and norm scales.
    """
    schedule = learning_rate_schedule(config, total_steps)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
        ),
    )


def learning_rate_schedule(config: FinetuneConfig, total_steps: int) -> optax.Schedule:
    return warmup_cosine(config.learning_rate, warmup_steps(total_steps, config.warmup_fraction), total_steps)


def warmup_steps(total_steps: int, warmup_fraction: float) -> int:
    """Rounded up, like transformers.TrainingArguments.get_warmup_steps."""
    return math.ceil(total_steps * warmup_fraction)


def warmup_cosine(peak: float, warmup: int, total_steps: int) -> optax.Schedule:
    """Learning rate of steps s = 0 .. total_steps - 1, like transformers.get_cosine_schedule_with_warmup.

    It is peak * s / warmup for s < warmup, then peak * (1 + cos(pi * (s - warmup) / (total_steps - warmup))) / 2.
    With a warm-up, step 0 therefore has rate 0: it only updates the moments, as in the paper's trainer.
    (optax.warmup_cosine_decay_schedule refuses runs so short that they are all warm-up.)
    """

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(1, warmup)
        falling = 0.5 * (1.0 + jnp.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))
        return peak * jnp.where(step < warmup, rising, jnp.maximum(falling, 0.0))

    return learning_rate


def decay_mask(parameters: Parameters) -> dict[str, bool]:
    """True where weight decay applies: matrices, not biases or norm scales."""
    return {name: not name.endswith(("bias", "norm.weight")) for name in parameters}
