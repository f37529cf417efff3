import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from lark_jax.evaluation.engines import WORKER


@pytest.fixture(scope="module")
def torch_engine():
    sys.path.insert(0, str(WORKER.parent))
    try:
        import torch_engine as module
    finally:
        sys.path.remove(str(WORKER.parent))
    return module


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The threads of a tiny model wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(random_student):
    return transformers.AutoModelForCausalLM.from_pretrained(random_student, dtype="float32").eval()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng()
    return [rng.integers(0, 95, length).tolist() for length in (1, 2, 13, 40)]


def decoding(torch_engine, **changes):
    fields = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "stop_ids": (97,), "pad_id": 95}
    return torch_engine.Decoding(**{**fields, **changes})


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_generate_of_transformers(torch_engine, model, prompts, penalty):
    options = decoding(torch_engine, temperature=0.0, repetition_penalty=penalty)
    rows = torch_engine.sample_rows(model, prompts, list(range(4)), [30] * 4, options)
    for prompt, row in zip(prompts, rows, strict=True):
        output = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=30, repetition_penalty=penalty,
            eos_token_id=97, pad_token_id=95,
        )  # fmt: skip
        assert row == output[0, len(prompt) :].tolist()


def test_batches_of_a_benchmark_do_not_depend_on_other_benchmarks(
    torch_engine, random_student, make_request, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch_engine, "MAX_TOKENS", 700)
    alone = make_request(random_student, tmp_path / "out.jsonl", "transformers", num_prompts=11, seeds=(5,))
    other = tuple(replace(prompt, benchmark="c", tokens=prompt.tokens * 3) for prompt in alone.prompts[:3])
    together = replace(alone, prompts=(*other, *alone.prompts), seeds=(0, 5))
    found = torch_engine.batches(together)
    assert [job for batch in found for job in batch] == list(together.jobs())
    of_it = [batch for batch in found if batch[0].seed == 5 and batch[0].prompt.benchmark == "b"]
    assert of_it == torch_engine.batches(alone)
    assert len(of_it) > 1


def test_a_row_depends_on_its_own_seed_only(torch_engine, model, prompts):
    options = decoding(torch_engine, temperature=0.8, top_p=0.9)
    seeds = [[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 43]]
    together = torch_engine.sample_rows(model, prompts, [seed for row in seeds for seed in row], [12] * 4, options)
    for index, prompt in enumerate(prompts):
        for copy, seed in enumerate(seeds[index]):
            (alone,) = torch_engine.sample_rows(model, [prompt], [seed], [12], options)
            assert alone == together[3 * index + copy]
    assert len({tuple(row) for row in together}) == len(together)


def test_rows_end_at_their_stop_token_or_their_own_budget(torch_engine, model, prompts):
    stop = tuple(range(0, 95, 9))  # frequent
    budgets = [1, 5, 17, 30]
    rows = torch_engine.sample_rows(model, prompts, list(range(40)), budgets, decoding(torch_engine, stop_ids=stop))
    for index, row in enumerate(rows):
        budget = budgets[index // 10]
        assert 1 <= len(row) <= budget
        assert not set(row[:-1]) & set(stop)
        assert row[-1] in stop or len(row) == budget
    assert len({len(row) for row in rows}) > 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95), (1.5, 0.5), (1.0, 0.01)])
def test_drawn_tokens_follow_the_warped_distribution(torch_engine, temperature, top_p):
    vocab_size, draws = 23, 40_000
    logits_v = torch.randn(vocab_size) * 2
    uniforms_r = torch.rand(draws, dtype=torch.float64)
    options = decoding(torch_engine, temperature=temperature, top_p=top_p)
    tokens_r = torch_engine.choose(logits_v.expand(draws, vocab_size), uniforms_r, options)
    warpers = transformers.LogitsProcessorList(
        [transformers.TemperatureLogitsWarper(temperature), transformers.TopPLogitsWarper(top_p)]
    )
    expected_v = torch.softmax(warpers(None, logits_v[None].clone())[0], dim=-1)
    measured_v = torch.bincount(tokens_r, minlength=vocab_size) / draws
    assert measured_v[expected_v == 0].sum() == 0
    assert (measured_v - expected_v).abs().max() < 5 * 0.5 / draws**0.5


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_give_tokens_inside_the_nucleus(torch_engine, uniform):
    logits_rv = torch.tensor([[0.0, 3.0, 1.0, -50.0]])
    options = decoding(torch_engine, top_p=0.99)
    (token,) = torch_engine.choose(logits_rv, torch.tensor([uniform], dtype=torch.float64), options).tolist()
    assert token == (1 if uniform == 0.0 else 0)


def test_penalty_equals_that_of_transformers(torch_engine):
    logits_rv = torch.randn(6, 50)
    histories_rt = torch.randint(0, 50, (6, 20))
    seen_rv = torch.zeros((6, 50), dtype=torch.bool).scatter(1, histories_rt, True)
    expected_rv = transformers.RepetitionPenaltyLogitsProcessor(1.7)(histories_rt, logits_rv.clone())
    torch.testing.assert_close(torch_engine.penalized(logits_rv, seen_rv, 1.7), expected_rv)


def test_batches_cover_all_jobs_in_order_and_respect_the_limits(torch_engine, tmp_path, random_student, make_request):
    request = make_request(random_student, tmp_path / "out.jsonl", "transformers", num_prompts=301, samples=7)
    batches = torch_engine.batches(request)
    assert [job.key for batch in batches for job in batch] == [job.key for job in request.jobs()]
    assert max(len(batch) * request.samples for batch in batches) <= torch_engine.MAX_ROWS
    assert len(batches) > 1
