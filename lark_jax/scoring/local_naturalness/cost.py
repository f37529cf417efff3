"""Analytic cost of the windows, and of the one pass that GRAPE takes over the same trajectories."""

from lark_jax.scoring.local_naturalness.windows import windows_of
from lark_jax.scoring.local_naturalness.work import Sizes, Work
from lark_jax.students.architecture import Architecture
from lark_jax.students.flops import attention_flops, forward_flops, pair_flops


def windows_over_one_pass(architecture: Architecture, work: Work) -> float:
    """FLOPs of everything that Local Naturalness needs, prompts once each, by those of one pass; padding in neither."""
    scored = [size for size in work.sizes if isinstance(size, Sizes)]
    windows = sum(window_flops(architecture, size, work.options.context) for size in scored)
    prompts = sum(
        forward_flops(architecture, size.prompt - 1, vocab=False)
        for part in work.parts
        for answers in part.prompts
        if isinstance(size := work.sizes[answers[0]], Sizes)
    )
    return (windows + prompts) / sum(one_pass_flops(architecture, size) for size in scored)


def window_flops(architecture: Architecture, size: Sizes, context: int) -> float:
    """FLOPs of the windows of one trajectory behind a prompt whose keys are there; counted as in `forward_flops`."""
    windows = windows_of(size.steps, context)
    lengths = windows.lengths
    tokens, scored = int(lengths.sum()), int((windows.stops - windows.scored).sum())
    pairs = float((lengths * (size.prompt - 1) + lengths * (lengths + 1) / 2).sum())
    layers = forward_flops(architecture, tokens, vocab=False) - attention_flops(architecture, tokens)
    head = 2.0 * scored * architecture.vocab_size * architecture.hidden_size
    # Tokens that are context alone have no use for what the last layer does after attention.
    output = architecture.num_heads * architecture.head_dim * architecture.hidden_size
    unused = output + 3 * architecture.hidden_size * architecture.intermediate_size
    return layers + head + pair_flops(architecture) * pairs - 2.0 * (tokens - scored) * unused


def one_pass_flops(architecture: Architecture, size: Sizes) -> float:
    """FLOPs of one forward pass over prompt and answer whose head is multiplied by the answer's tokens alone."""
    targets = int(size.steps.sum())
    head = 2.0 * targets * architecture.vocab_size * architecture.hidden_size
    return forward_flops(architecture, size.prompt + targets - 1, vocab=False) + head
