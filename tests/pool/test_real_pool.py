"""9,900 published trajectories under two real tokenizers."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from lark_jax.pool import SkippedRecord, read_pool
from lark_jax.rendering.batching import assemble, plan_batches
from lark_jax.rendering.chat import RenderedTrajectory, load_chat_format, render_trajectories

MAX_LENGTH = 384
SAMPLED_PROBLEMS = 12

# What each template writes around the prompt's turns, written out by hand.
GENERATION_PROMPTS = {
    "Qwen2.5-base": "<|im_start|>assistant\n",
    "minimind": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
}


@pytest.fixture(scope="module")
def pool(shared_data):
    return read_pool(shared_data / "pool" / "math_l5.jsonl")


@pytest.fixture(scope="module")
def sample(pool):
    problems = list(pool.by_problem().values())
    chosen = np.random.default_rng().choice(len(problems), SAMPLED_PROBLEMS, replace=False)
    return [trajectory for index in chosen for trajectory in problems[index]]


def reference_lengths(tokenizer, trajectory, generation_prompt):
    turns = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in trajectory.prompt)
    prompt = tokenizer(turns + generation_prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(trajectory.response, add_special_tokens=False)["input_ids"]
    return prompt, [*answer, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_the_pool_has_450_problems_with_22_candidates_each(pool):
    assert len(pool.trajectories) == 9900
    assert pool.skipped == ()
    groups = pool.by_problem()
    assert len(groups) == 450
    assert {len(group) for group in groups.values()} == {22}
    assert all(isinstance(item.correct, bool) and "gold" in item.meta for item in pool.trajectories)


@pytest.mark.parametrize("name", GENERATION_PROMPTS)
def test_tokens_and_counts_agree_with_an_independent_rendering(shared_data, sample, name):
    folder = shared_data / "tokenizers" / name
    chat = load_chat_format(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = list(render_trajectories(chat, sample, MAX_LENGTH))
    truncated = skipped = 0
    for trajectory, result in zip(sample, results, strict=True):
        prompt, target = reference_lengths(tokenizer, trajectory, GENERATION_PROMPTS[name])
        if len(prompt) >= MAX_LENGTH:
            skipped += 1
            assert isinstance(result, SkippedRecord)
            assert result.reason.startswith("prompt_fills_max_length: ")
            continue
        truncated += len(prompt) + len(target) > MAX_LENGTH
        assert isinstance(result, RenderedTrajectory)
        assert result.prompt_tokens.tolist() == prompt
        assert result.target_tokens.tolist() == target[: MAX_LENGTH - len(prompt)]
    rendered = [result for result in results if isinstance(result, RenderedTrajectory)]
    assert sum(result.truncated for result in rendered) == truncated > 0
    assert len(results) - len(rendered) == skipped


def test_the_qwen3_template_adds_a_think_block_and_is_refused(shared_data, sample):
    chat = load_chat_format(shared_data / "tokenizers" / "Qwen3")
    results = list(render_trajectories(chat, sample, MAX_LENGTH))
    assert {result.reason.partition(":")[0] for result in results} == {"think_block_added"}


def test_batches_hold_every_target_token_of_the_sample_once(shared_data, sample):
    chat = load_chat_format(shared_data / "tokenizers" / "minimind")
    results = render_trajectories(chat, sample, 1024)
    rendered = [result for result in results if isinstance(result, RenderedTrajectory)]
    lengths = [result.num_inputs for result in rendered]
    plans = plan_batches(lengths, tokens_per_batch=2048, data_shards=2)
    targets = sum(float(assemble(rendered, plan, chat.pad_id).mask_bt.sum()) for plan in plans)
    assert targets == sum(len(result.target_tokens) for result in rendered)
    assert 1 - sum(lengths) / sum(plan.rows * plan.length for plan in plans) < 0.3  # padding
