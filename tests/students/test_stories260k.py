"""A small trained checkpoint: the numbers of a real language model, not only of random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from lark_jax.students import load_student


@pytest.fixture
def stories260k(shared_data):
    folder = shared_data / "checkpoints" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"checkpoint not found at {folder}")
    return folder


def mean_cross_entropy(logits, tokens):
    """float64, of tokens 1..T-1 given those before."""
    logits = np.asarray(logits, np.float64)[:, :-1]
    gold = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    peak = logits.max(axis=-1)
    return (np.log(np.exp(logits - peak[..., None]).sum(axis=-1)) + peak - gold).mean()


def test_loss_on_its_own_samples_equals_transformers_and_is_far_below_shuffled_tokens(stories260k):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(stories260k).eval()
    start = torch.full((4, 1), model.config.bos_token_id)
    with torch.no_grad():
        sampled = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=200, eos_token_id=None
        )
        theirs = mean_cross_entropy(model(sampled).logits.numpy(), sampled.numpy())
    tokens = sampled.numpy()
    student, _ = load_student(stories260k, dtype="float32")
    ours = mean_cross_entropy(student.logits(jnp.asarray(tokens)), tokens)
    assert ours == pytest.approx(theirs, abs=1e-4)
    shuffled = np.random.default_rng().permuted(tokens, axis=1)
    assert mean_cross_entropy(student.logits(jnp.asarray(shuffled)), shuffled) > ours + 2.0
