"""Analytic cost of the windows, of a batch of them, and of the one pass that GRAPE takes over the same trajectories."""

from lark_jax.scoring.local_naturalness.windows import WindowBatch, windows_of
from lark_jax.scoring.local_naturalness.work import Part, Sizes, Work
from lark_jax.scoring.throughput import Load
from lark_jax.students.architecture import Architecture
from lark_jax.students.flops import attention_flops, forward_flops, pair_flops


def windows_over_one_pass(architecture: Architecture, work: Work) -> float:
    """FLOPs of Local Naturalness, with one pass over each prompt, over those of one pass; padding is not counted."""
    scored = [size for size in work.sizes if isinstance(size, Sizes)]
    windows = sum(window_flops(architecture, size, work.options.context) for size in scored)
    prompts = sum(
        forward_flops(architecture, size.prompt - 1, vocab=False)
        for part in work.parts
        for answers in part.prompts
        if isinstance(size := work.sizes[answers[0]], Sizes)
    )
    return (windows + prompts) / sum(one_pass_flops(architecture, size) for size in scored)


def load_of_part(architecture: Architecture, work: Work, part: Part) -> Load:
    """The load of all batches of a part in steps, before it is rendered: without the padding."""
    sizes = [size for member in part.members if isinstance(size := work.sizes[member], Sizes)]
    tokens = sum(int(windows_of(size.steps, work.options.context).lengths.sum()) for size in sizes)
    flops = sum(window_flops(architecture, size, work.options.context) for size in sizes)
    return Load(sum(len(size.steps) for size in sizes), tokens, tokens, flops)


def load_of_batch(architecture: Architecture, batch: WindowBatch) -> Load:
    """The load of one batch in steps; no step is in two batches."""
    real_bt, scored_s = batch.segment_ids_bt > 0, batch.step_ids_s[batch.step_ids_s >= 0]
    pairs = float((batch.positions_bt[real_bt] + 1).sum())
    tokens = int(real_bt.sum())
    flops = _flops(architecture, tokens, len(scored_s), pairs)
    return Load(len(set(scored_s.tolist())), tokens, batch.tokens_bt.size, flops)


def window_flops(architecture: Architecture, size: Sizes, context: int) -> float:
    """FLOPs of the windows of one trajectory after a prompt whose keys are known; counted as in `forward_flops`."""
    windows = windows_of(size.steps, context)
    lengths = windows.lengths
    pairs = float((lengths * (size.prompt - 1) + lengths * (lengths + 1) / 2).sum())
    return _flops(architecture, int(lengths.sum()), int((windows.stops - windows.scored).sum()), pairs)


def one_pass_flops(architecture: Architecture, size: Sizes) -> float:
    """FLOPs of one forward pass over prompt and answer in which only the answer's tokens reach the head."""
    targets = int(size.steps.sum())
    head = 2.0 * targets * architecture.vocab_size * architecture.hidden_size
    return forward_flops(architecture, size.prompt + targets - 1, vocab=False) + head


def _flops(architecture: Architecture, tokens: int, scored: int, pairs: float) -> float:
    """FLOPs of windows with so many tokens, scored ones among them, and pairs of a token and one that it attends to."""
    layers = forward_flops(architecture, tokens, vocab=False) - attention_flops(architecture, tokens)
    head = 2.0 * scored * architecture.vocab_size * architecture.hidden_size
    # Nothing uses what the last layer computes after attention for tokens that are only context.
    output = architecture.num_heads * architecture.head_dim * architecture.hidden_size
    unused = output + 3 * architecture.hidden_size * architecture.intermediate_size
    return layers + head + pair_flops(architecture) * pairs - 2.0 * (tokens - scored) * unused
