"""Which blocks are skipped, and how memory grows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_base import random_inputs

from lark_jax.students.attention import blockwise
from lark_jax.students.attention.dispatch import attend

BLOCK = 32


@pytest.mark.parametrize(
    ("spoilt", "untouched", "options"),
    [
        # The edges of segments are those of blocks.
        ((2, 4), [0, 1, 4, 5], {"segment_ids": np.repeat([[1, 2, 3]], 2 * BLOCK, axis=1)}),
        # Queries of block 3 see back to the first token of block 2.
        ((0, 2), [3, 4, 5], {"window": BLOCK + 1}),
    ],
    ids=["segments", "window"],
)
def test_blocks_that_are_not_seen_are_skipped(spoilt, untouched, options, monkeypatch):
    """NaN would spoil a sum even with weight zero; in a block that is skipped it cannot."""
    monkeypatch.setattr(blockwise, "LARGEST_BLOCK", BLOCK)
    qkv = random_inputs(6 * BLOCK, batch=1)
    tokens = (BLOCK * np.array(untouched)[:, None] + np.arange(BLOCK)).ravel()

    def value(q, k, v):
        out = attend(q, k, v, backend="blockwise", **options)[:, tokens]
        return (out**2).sum(), out

    value_and_gradients = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)
    (_, clean), _ = value_and_gradients(*qkv)
    (_, out), gradients = value_and_gradients(
        *(x.at[:, BLOCK * spoilt[0] : BLOCK * spoilt[1]].set(jnp.nan) for x in qkv)
    )
    np.testing.assert_array_equal(out, clean)
    for gradient in gradients:
        assert np.isfinite(gradient[:, tokens]).all()


def test_memory_grows_with_time_and_not_with_its_square():
    def temporary_bytes(time, backend):
        arguments = [jax.ShapeDtypeStruct((1, time, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]
        loss = jax.grad(lambda *qkv: attend(*qkv, backend=backend).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        return jax.jit(loss).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    short, long = (temporary_bytes(time, "blockwise") for time in (8_192, 32_768))
    scores_8k = 4 * 8_192 * 8_192 * 4
    assert short < scores_8k / 20
    assert long < 4.5 * short
    assert temporary_bytes(8_192, "dense") > scores_8k / 2
