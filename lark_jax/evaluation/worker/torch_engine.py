"""Samples from transformers on torch: the engine that works anywhere. A plain decoding loop with a KV cache.

Every row draws from its own generator, one uniform number per token, so a sample does not depend on its neighbours in
the batch. Batches are formed from all jobs of a benchmark and seed, finished or not, so a resumed run has the same
batches, and so does one with more benchmarks or seeds.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from worker_records import Generation, Job, Request, Sample

MAX_ROWS = 256  # sequences decoded together
MAX_TOKENS = 1 << 18  # of their KV caches together, at full length


@dataclass(frozen=True)
class Decoding:
    temperature: float  # 0: greedy
    top_p: float
    repetition_penalty: float
    stop_ids: tuple[int, ...]
    pad_id: int


def generate(request: Request, pending: Sequence[Job]) -> Iterator[Generation]:
    """Yields the pending jobs, batch by batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.model, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(request.model, dtype=request.dtype, local_files_only=True)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    decoding = Decoding(
        request.temperature, request.top_p, request.repetition_penalty, request.stop_ids, request.pad_id
    )
    still_pending = {job.key for job in pending}
    for batch in batches(request):
        if not any(job.key in still_pending for job in batch):
            continue
        prompts = [job.prompt.tokens for job in batch]
        seeds = [request.first_seed(job) + sample for job in batch for sample in range(request.samples)]
        budgets = [request.budget(job.prompt) for job in batch]
        rows = sample_rows(model, prompts, seeds, budgets, decoding)
        for index, job in enumerate(batch):
            if job.key in still_pending:
                job_rows = rows[index * request.samples : (index + 1) * request.samples]
                yield Generation(job, tuple(_sample(tokens, decoding.stop_ids, tokenizer) for tokens in job_rows))


def pending_batches(request: Request, pending: Sequence[Job]) -> list[list[Job]]:
    """The pending jobs of each batch that has any."""
    keys = {job.key for job in pending}
    found = ([job for job in batch if job.key in keys] for batch in batches(request))
    return [batch for batch in found if batch]


def batches(request: Request) -> list[tuple[Job, ...]]:
    """All jobs of the request in order; as many of one benchmark and seed together as the limits above allow."""
    found = []
    for _, group in itertools.groupby(request.jobs(), lambda job: (job.seed, job.prompt.benchmark)):
        jobs = tuple(group)
        longest = max(len(job.prompt.tokens) + request.budget(job.prompt) for job in jobs)
        size = max(1, min(MAX_ROWS, MAX_TOKENS // longest) // request.samples)
        found += [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return found


@torch.inference_mode()
def sample_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    budgets: Sequence[int],
    decoding: Decoding,
) -> list[list[int]]:
    """Continues every prompt `len(seeds) / len(prompts)` times, all in one batch.

    Args:
      model: a causal language model of transformers.
      prompts: token ids, of any lengths.
      seeds: one per row; the rows of a prompt follow each other.
      budgets: per prompt, how many tokens may be generated.

    Returns:
      The generated tokens of each row, including its stop token.
    """
    copies = len(seeds) // len(prompts)
    tokens_pt, mask_pt = (array.to(model.device) for array in _left_padded(prompts, decoding.pad_id))
    positions_pt = (mask_pt.cumsum(dim=1) - 1).clamp(min=0)
    output = model(tokens_pt, attention_mask=mask_pt, position_ids=positions_pt, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(copies)
    logits_rv = output.logits[:, -1].float().repeat_interleave(copies, dim=0)
    mask_rt = mask_pt.repeat_interleave(copies, dim=0)
    budgets_r = torch.tensor(budgets, device=model.device).repeat_interleave(copies)
    seen_rv = _seen_tokens(prompts, logits_rv.shape[1]).to(model.device).repeat_interleave(copies, dim=0)
    uniforms_rt = _uniforms(seeds, max(budgets)).to(model.device)
    stop_ids = torch.tensor(decoding.stop_ids, device=model.device)

    rows: list[list[int]] = [[] for _ in seeds]
    alive_r = torch.arange(len(seeds), device=model.device)
    for step in range(max(budgets)):
        tokens_r = choose(
            penalized(logits_rv, seen_rv, decoding.repetition_penalty), uniforms_rt[alive_r, step], decoding
        )
        for row, token in zip(alive_r.tolist(), tokens_r.tolist(), strict=True):
            rows[row].append(token)
        seen_rv[torch.arange(len(tokens_r), device=model.device), tokens_r] = True
        going_on_r = ~torch.isin(tokens_r, stop_ids) & (budgets_r[alive_r] > step + 1)
        if not going_on_r.any():
            break
        if not going_on_r.all():
            keep = going_on_r.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive_r, tokens_r, mask_rt, seen_rv = alive_r[keep], tokens_r[keep], mask_rt[keep], seen_rv[keep]
        positions_r = mask_rt.sum(dim=1)
        mask_rt = torch.cat([mask_rt, mask_rt.new_ones((len(mask_rt), 1))], dim=1)
        output = model(
            tokens_r[:, None],
            attention_mask=mask_rt,
            position_ids=positions_r[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits_rv = output.logits[:, -1].float()
    return rows


def penalized(logits_rv: torch.Tensor, seen_rv: torch.Tensor, penalty: float) -> torch.Tensor:
    """Repetition penalty of Keskar et al. (2019) on tokens of the prompt and of the answer so far, as in vLLM."""
    if penalty == 1.0:
        return logits_rv
    return torch.where(seen_rv, torch.where(logits_rv > 0, logits_rv / penalty, logits_rv * penalty), logits_rv)


def choose(logits_rv: torch.Tensor, uniforms_r: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """One token per row: the most likely at temperature 0, else drawn from the smallest set with probability top_p.

    Draws by inverting the cumulative distribution at `uniforms_r`, float64 in [0, 1).
    """
    if decoding.temperature == 0:
        return logits_rv.argmax(dim=1)
    probs_rv, order_rv = torch.softmax(logits_rv.double() / decoding.temperature, dim=1).sort(dim=1, descending=True)
    cumulative_rv = probs_rv.cumsum(dim=1)
    probs_rv = probs_rv.masked_fill(cumulative_rv - probs_rv >= decoding.top_p, 0.0)
    cumulative_rv = probs_rv.cumsum(dim=1)
    index_r = (cumulative_rv <= uniforms_r[:, None] * cumulative_rv[:, -1:]).sum(dim=1, keepdim=True)
    return order_rv.gather(1, index_r)[:, 0]


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    tokens_pt = torch.full((len(prompts), longest), pad_id)
    mask_pt = torch.zeros((len(prompts), longest), dtype=torch.long)
    for index, prompt in enumerate(prompts):
        tokens_pt[index, longest - len(prompt) :] = torch.tensor(prompt)
        mask_pt[index, longest - len(prompt) :] = 1
    return tokens_pt, mask_pt


def _seen_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> torch.Tensor:
    seen_pv = torch.zeros((len(prompts), vocab_size), dtype=torch.bool)
    for index, prompt in enumerate(prompts):
        seen_pv[index, torch.tensor(prompt)] = True
    return seen_pv


def _uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators])


def _sample(tokens: list[int], stop_ids: tuple[int, ...], tokenizer: Any) -> Sample:
    stopped = tokens[-1] in stop_ids
    text = tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True)
    return Sample(text, "stop" if stopped else "length", len(tokens))
