"""Times `token_statistics` at several chunk sizes against a dense peer (log_softmax and Brier from full logits).

    python scripts/bench_token_statistics.py --out=bench.json
    python scripts/bench_token_statistics.py --tokens=32768 --hidden_size=3584 --vocab_size=152064 --dense_tokens=8192

Both get the same operands; the peer works on slices of --dense_tokens tokens, so that its logits fit. Rounds alternate
between the contestants, so that a busy machine slows all of them: its ratios are more reliable than its seconds. A
ratio above 1 means that the op is faster.
"""

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from absl import app, flags
from jax import lax

from lark_jax.ops.token_statistics import token_statistics

_TOKENS = flags.DEFINE_integer("tokens", 1024, "target tokens", lower_bound=1)
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 896, "width of the hidden states", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32_000, "rows of the head", lower_bound=2)
_DENSE_TOKENS = flags.DEFINE_integer("dense_tokens", 1024, "tokens per slice of the dense peer", lower_bound=1)
_CHUNKS = flags.DEFINE_list("chunks", ["1024", "2048", "4096", "8192", "16384"], "chunk sizes to time")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of hidden states and head")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "timed rounds; the median counts", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file to write")

Contestant = Callable[[], object]


def dense_statistics(
    hidden_nd: jax.Array, head_vd: jax.Array, targets_n: jax.Array, slice_size: int
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and textbook Brier score from fp32 logits of `slice_size` tokens at a time."""

    def one_slice(hidden_td: jax.Array, targets_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_tv = jnp.einsum("td,vd->tv", hidden_td, head_vd, preferred_element_type=jnp.float32)
        log_probs_tv = jax.nn.log_softmax(logits_tv)
        gold_t = jnp.take_along_axis(log_probs_tv, targets_t[:, None], axis=1)[:, 0]
        return -gold_t, 1.0 - 2.0 * jnp.exp(gold_t) + jnp.sum(jnp.exp(2.0 * log_probs_tv), axis=1)

    slices = (hidden_nd.reshape(-1, slice_size, hidden_nd.shape[1]), targets_n.reshape(-1, slice_size))
    return lax.map(lambda operands: one_slice(*operands), slices)


def median_seconds(contestants: dict[str, Contestant], rounds: int) -> dict[str, float]:
    """Median over alternating rounds, after one untimed call each."""
    for run in contestants.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _TOKENS.value % _DENSE_TOKENS.value:
        raise app.UsageError("--tokens: expected a multiple of --dense_tokens")
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.dtype(_DTYPE.value)
    hidden_nd = jax.random.normal(keys[0], (_TOKENS.value, _HIDDEN_SIZE.value), dtype)
    head_vd = jax.random.normal(keys[1], (_VOCAB_SIZE.value, _HIDDEN_SIZE.value), dtype) * 0.02
    targets_n = jax.random.randint(keys[2], (_TOKENS.value,), 0, _VOCAB_SIZE.value)

    dense = jax.jit(dense_statistics, static_argnums=3)
    dense_args = (hidden_nd, head_vd, targets_n, _DENSE_TOKENS.value)
    chunks = [int(chunk) for chunk in _CHUNKS.value if int(chunk) <= _VOCAB_SIZE.value]
    contestants: dict[str, Contestant] = {"dense": lambda: dense(*dense_args)}
    temporaries = {"dense": dense.lower(*dense_args).compile().memory_analysis().temp_size_in_bytes}
    for chunk in chunks:
        lowered = token_statistics.lower(hidden_nd, head_vd, targets_n, vocab_chunk=chunk)
        temporaries[f"chunk {chunk}"] = lowered.compile().memory_analysis().temp_size_in_bytes
        contestants[f"chunk {chunk}"] = lambda chunk=chunk: token_statistics(
            hidden_nd, head_vd, targets_n, vocab_chunk=chunk
        )

    seconds = median_seconds(contestants, _ROUNDS.value)
    result = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})",
        "host": f"{platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "shape": {"tokens": _TOKENS.value, "hidden_size": _HIDDEN_SIZE.value, "vocab_size": _VOCAB_SIZE.value},
        "dtype": _DTYPE.value,
        "rounds": _ROUNDS.value,
        "runs": [
            {
                "name": name,
                "seconds": value,
                "tokens_per_second": _TOKENS.value / value,
                "times_as_fast_as_dense": seconds["dense"] / value,
                "temporaries_mib": temporaries[name] / 2**20,
            }
            for name, value in seconds.items()
        ],
    }
    print(f"{result['device']}, jax {jax.__version__}, {result['shape']}, {_DTYPE.value}")
    for run in result["runs"]:
        print(
            f"{run['name']:>14}: {run['seconds']:8.3f} s  {run['times_as_fast_as_dense']:6.2f}x dense  "
            f"{run['temporaries_mib']:9.1f} MiB of temporaries"
        )
    if _OUT.value:
        Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
