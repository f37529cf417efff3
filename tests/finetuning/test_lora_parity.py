"""LoRA against PEFT on torch: the same weights, adapter and trajectories, in fp32, one trajectory at a time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_sizes import LLAMA3_SCALING, SIZES
from safetensors.numpy import load_file
from tiny_run import CONFIG, PAD_ID, VOCAB_SIZE, random_examples, run, weights_of
from twenty_training_steps import mesh_of

from lark_jax.config import LORA_TARGETS, FinetuneConfig
from lark_jax.finetuning import Example, read_metrics
from lark_jax.finetuning.data import TrainingSet, cut
from lark_jax.finetuning.optimizer import make_optimizer
from lark_jax.finetuning.parameter_sets import frozen_parameters, lora_of
from lark_jax.finetuning.step import initial_state, make_train_step, put_rows, zero_sums
from lark_jax.runtime.sharding import DATA
from lark_jax.students import Decoder, export_adapter, export_student, load_student
from lark_jax.students.checkpoint.adapters import with_fresh_adapter
from lark_jax.students.lora import FACTOR_B, is_factor
from lark_jax.students.parameters import flatten_parameters, replace_parameters
from lark_jax.students.sharded import ShardedStudent

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SEED, STEPS, WARMUP = 11, 10, 2
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "llama": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_SCALING}),
}
RECIPE = dataclasses.replace(CONFIG, epochs=2, learning_rate=1e-2, warmup_fraction=0.2, lora_rank=4, lora_alpha=6.0)
CONFIGS = {
    "qwen2": RECIPE,
    "llama": dataclasses.replace(RECIPE, lora_targets=("down_proj", "q_proj", "v_proj")),
}


class Steps(NamedTuple):
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    adapter: Mapping[str, np.ndarray]  # PEFT's names


class Peer(NamedTuple):
    folder: Path  # HF checkpoint
    student: Decoder  # loaded from it
    examples: tuple[Example, ...]
    adapted: Decoder  # with an adapter whose B is not zero
    loss: float  # of the first step's trajectories, with that adapter
    gradients: Mapping[str, np.ndarray]
    steps: Steps  # of a run from a fresh adapter


@pytest.fixture(scope="module")
def peer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Peer]:
    return functools.cache(lambda family: make_peer(family, tmp_path_factory.mktemp(family)))


def make_peer(family: str, folder: Path) -> Peer:
    save_checkpoint(family, folder / "base")
    student, _ = load_student(folder / "base", dtype="float32")
    examples, config = random_examples(np.random.default_rng().integers(1 << 30), 6, 3), CONFIGS[family]
    fresh = with_fresh_adapter(student, lora_of(config), SEED, mesh_of(1, 1))
    adapted = with_random_b(fresh)
    data = TrainingSet(examples, config.batch_size, SEED)
    model = peft_model(adapted, folder / "base", folder / "adapted")
    loss = step_loss(model, data, 0)
    loss.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.requires_grad}
    theirs = train(peft_model(fresh, folder / "base", folder / "fresh"), data, config)
    return Peer(folder / "base", student, examples, adapted, loss.item(), clean(gradients), theirs)


def save_checkpoint(family: str, folder: Path) -> None:
    name, fields = FAMILIES[family]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **fields))
    for key, parameter in model.named_parameters():
        if not key.endswith("norm.weight"):
            parameter.data.normal_(0.0, 0.15)
    model.float().save_pretrained(folder)


def with_random_b(student: Decoder) -> Decoder:
    graph, state = nnx.split(student)
    values, rng = flatten_parameters(state), np.random.default_rng()
    for name in values:
        if name.endswith(FACTOR_B):
            values[name] = jnp.asarray(rng.normal(scale=0.1, size=values[name].shape), jnp.float32)
    return nnx.merge(graph, replace_parameters(state, values))


def peft_model(student: Decoder, base: Path, folder: Path) -> Any:
    export_adapter(student, str(base), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def step_loss(model: Any, data: TrainingSet, step: int) -> Any:
    members = data.batch(step).members
    return sum(_weighted_loss(model, data.examples[member]) for member in members) / len(members)


def _weighted_loss(model: Any, example: Example) -> Any:
    prompt, target = example.rendered.prompt_tokens, example.rendered.target_tokens
    tokens = torch.tensor(np.concatenate([prompt, target])[None], dtype=torch.long)
    logits = model(input_ids=tokens[:, :-1]).logits[0, len(prompt) - 1 :]
    return example.weight * torch.nn.functional.cross_entropy(logits, tokens[0, len(prompt) :])


def train(model: Any, data: TrainingSet, config: FinetuneConfig) -> Steps:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        loss = step_loss(model, data, step)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item())
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    values = {name: p.detach().numpy().copy() for name, p in model.named_parameters() if p.requires_grad}
    return Steps(tuple(losses), tuple(norms), clean(values))


def clean(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the name of the adapter, which files leave out."""
    return {name.replace(".default.", "."): value for name, value in values.items()}


def peft_names(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Ours, stacked, by PEFT's names; only those of the adapter."""
    return {
        f"base_model.model.model.layers.{index}.{name.removeprefix('layers.')}": layer
        for name, value in values.items()
        if is_factor(name)
        for index, layer in enumerate(np.asarray(value))
    }


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        norm = np.linalg.norm(value)
        assert norm > 0
        assert np.linalg.norm(found[name] - value) <= tolerance * norm, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout", "packing"),
    [
        ("qwen2", (1, 1), False),
        ("qwen2", (8, 1), False),
        ("qwen2", (2, 2), False),
        ("llama", (1, 2), False),
        ("llama", (4, 2), True),
    ],
)
def test_loss_and_gradient_are_those_of_peft_in_every_layout(
    family: str, layout: tuple[int, int], packing: bool, peer_of: Callable[[str], Peer]
) -> None:
    theirs, mesh = peer_of(family), mesh_of(*layout)
    config = dataclasses.replace(CONFIGS[family], packing=packing)
    data, optimizer = TrainingSet(theirs.examples, config.batch_size, SEED), make_optimizer(config, STEPS)
    layout = ShardedStudent.abstract(theirs.adapted, mesh)
    frozen = frozen_parameters(theirs.adapted, layout)
    step = make_train_step(layout, optimizer, vocab_chunk=48, frozen=frozen)
    parameters = initial_state(theirs.adapted, layout, optimizer).parameters
    sums = zero_sums(layout)
    for micro_batch in cut(data, data.batch(0), config, data_shards=mesh.shape[DATA], pad_id=PAD_ID):
        sums, _ = step.accumulate(parameters, sums, put_rows(micro_batch, mesh))
    assert float(sums.loss) == pytest.approx(theirs.loss, rel=1e-5)
    assert all(is_factor(name) for name in sums.gradients)
    assert_close(peft_names(sums.gradients), theirs.gradients, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "packing"), [("qwen2", True), ("llama", False)])
def test_ten_steps_follow_peft_and_the_frozen_weights_keep_their_bytes(
    family: str, packing: bool, peer_of: Callable[[str], Peer], tmp_path: Path
) -> None:
    theirs = peer_of(family)
    config = dataclasses.replace(CONFIGS[family], packing=packing)
    result = run(tmp_path, config, student=theirs.student, examples=theirs.examples, seed=SEED)
    metrics = read_metrics(result.metrics)
    assert result.steps == len(metrics) == STEPS
    np.testing.assert_allclose([step.loss for step in metrics], theirs.steps.losses, rtol=1e-4)
    np.testing.assert_allclose([step.grad_norm for step in metrics], theirs.steps.grad_norms, rtol=1e-4)
    weights, before = weights_of(result.student), weights_of(theirs.student)
    assert_close(peft_names(weights), theirs.steps.adapter, 1e-4)
    assert {name for name in weights if not is_factor(name)} == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(weights[name], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_checkpoint_has_the_logits_of_the_adapter_in_peft(
    family: str, peer_of: Callable[[str], Peer], tmp_path: Path
) -> None:
    theirs, tokens = peer_of(family), np.random.default_rng().integers(0, VOCAB_SIZE, (2, 50))
    source = {path.name: path.read_bytes() for path in theirs.folder.iterdir()}
    export_student(theirs.adapted, theirs.folder, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    adapted = peft_model(theirs.adapted, theirs.folder, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens)).logits.numpy()
        found = merged(torch.tensor(tokens)).logits.numpy()
        plain = adapted.get_base_model()
        with adapted.disable_adapter():
            without = plain(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(theirs.adapted.logits(jnp.asarray(tokens)), expected, rtol=0, atol=1e-4)
    assert np.abs(without - expected).max() > 0.1, "the adapter changes nothing: the comparison proves little"
    assert {path.name: path.read_bytes() for path in theirs.folder.iterdir()} == source


def test_peft_knows_rank_alpha_and_targets(peer_of: Callable[[str], Peer], tmp_path: Path) -> None:
    theirs = peer_of("llama")
    export_adapter(theirs.adapted, "some/base", tmp_path / "adapter")
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 6.0, "some/base")
    assert set(config.target_modules) == {"q_proj", "v_proj", "down_proj"}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
    assert_close(tensors, peft_names(weights_of(theirs.adapted)), 0.0)


def test_all_linear_layers_of_a_decoder_are_known_targets(peer_of: Callable[[str], Peer]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(peer_of("qwen2").folder)
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert linear - {"lm_head"} == set(LORA_TARGETS)
    adapted = {name.split(".")[2] for name in weights_of(peer_of("qwen2").adapted) if is_factor(name)}
    assert adapted == set(LORA_TARGETS)
