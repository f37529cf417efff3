"""Twenty optimizer steps against an independent torch implementation: Eq. 1 one trajectory at a time, in fp32.

The reference is transformers' model, torch.optim.AdamW, HF's schedule and torch's clipping, on rows without padding.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_sizes import LLAMA3_SCALING, SIZES
from tiny_run import CONFIG, random_examples, run, weights_of

from lark_jax.finetuning import Example, read_metrics
from lark_jax.finetuning.data import TrainingSet
from lark_jax.students.architecture import architecture_from_config
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import abstract_decoder, replace_parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SEED, STEPS, WARMUP = 11, 20, 4
RECIPE = dataclasses.replace(CONFIG, epochs=4, learning_rate=1e-3, warmup_fraction=0.2, max_grad_norm=1.0)
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "llama": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_SCALING}),
}


class TorchStep(NamedTuple):
    loss: float
    grad_norm: float
    learning_rate: float


class TorchRun(NamedTuple):
    examples: tuple[Example, ...]
    config: Mapping[str, Any]  # of the HF model
    initial: Mapping[str, np.ndarray]  # HF name -> value
    final: Mapping[str, np.ndarray]
    steps: tuple[TorchStep, ...]


@functools.cache
def torch_run(family: str) -> TorchRun:
    examples = random_examples(np.random.default_rng().integers(1 << 30), 6, 3)
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    for key, parameter in model.named_parameters():
        # So much larger than fresh ones that gradients cross the clipping limit; biases are not zero.
        if not key.endswith("norm.weight"):
            parameter.data.normal_(0.0, 0.1)
    initial = _values(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    data, steps = TrainingSet(examples, RECIPE.batch_size, SEED), []
    for step in range(STEPS):
        members = data.batch(step).members
        loss = sum(_weighted_loss(model, examples[member]) for member in members) / len(members)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.append(TorchStep(loss.item(), norm.item(), scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return TorchRun(examples, config.to_dict(), initial, _values(model), tuple(steps))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "packing"), [("qwen2", False), ("llama", True)])
def test_twenty_weighted_steps_follow_torch(family: str, packing: bool, tmp_path: Path) -> None:
    theirs = torch_run(family)
    config = dataclasses.replace(RECIPE, packing=packing)
    result = run(tmp_path, config, student=_student(theirs), examples=theirs.examples, seed=SEED)
    metrics = read_metrics(result.metrics)
    assert result.steps == len(metrics) == STEPS
    assert {step.trajectories for step in metrics} == {2, 4}  # the last batch of an epoch is short
    assert len({example.weight for example in theirs.examples}) == len(theirs.examples)
    assert max(step.grad_norm for step in metrics) > 1.0  # else clipping is not tested
    for ours, expected in zip(metrics, theirs.steps, strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert ours.learning_rate == pytest.approx(expected.learning_rate, rel=1e-5, abs=1e-10)
    actual = _hf_names(weights_of(result.student))
    assert actual.keys() == theirs.final.keys()
    for name, value in theirs.final.items():
        assert np.linalg.norm(actual[name] - value) <= 1e-4 * np.linalg.norm(value), name


def test_runs_are_really_packed_and_rope_is_really_scaled() -> None:
    theirs = torch_run("llama")
    data, cut = TrainingSet(theirs.examples, RECIPE.batch_size, SEED), {"tokens_per_batch": 64, "data_shards": 1}
    plans = [plan for step in range(data.steps_per_epoch) for plan in data.packed_plans(data.batch(step), **cut)]
    assert max(len(row) for plan in plans for row in plan.members) > 1
    assert architecture_from_config(theirs.config).rope_scaling.rope_type == "llama3"


def _weighted_loss(model: Any, example: Example) -> Any:
    prompt, target = example.rendered.prompt_tokens, example.rendered.target_tokens
    tokens = torch.tensor(np.concatenate([prompt, target])[None], dtype=torch.long)
    logits = model(input_ids=tokens[:, :-1]).logits[0, len(prompt) - 1 :]
    return example.weight * torch.nn.functional.cross_entropy(logits, tokens[0, len(prompt) :])


def _values(model: Any) -> dict[str, np.ndarray]:
    """A tied head is one parameter, under the embedding's name."""
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def _student(theirs: TorchRun) -> Decoder:
    """Our decoder with their initial weights."""
    graph, state = nnx.split(abstract_decoder(architecture_from_config(theirs.config), "float32"))
    values = {ours: jnp.asarray(value) for ours, value in _our_names(theirs.initial).items()}
    return nnx.merge(graph, replace_parameters(state, values))


def _our_names(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Layers are stacked on a leading axis."""
    named: dict[str, Any] = {}
    for name, value in weights.items():
        name = name.removeprefix("model.")
        if name.startswith("layers."):
            _, _, rest = name.split(".", 2)
            named.setdefault(f"layers.{rest}", []).append(value)
        else:
            named[name] = value
    return {name: np.stack(value) if isinstance(value, list) else value for name, value in named.items()}


def _hf_names(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    named = {}
    for name, value in weights.items():
        if name.startswith("layers."):
            rest = name.removeprefix("layers.")
            named |= {f"model.layers.{index}.{rest}": layer for index, layer in enumerate(value)}
        else:
            named[name if name == "lm_head.weight" else f"model.{name}"] = value
    return named
