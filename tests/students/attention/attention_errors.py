"""Program for another process: errors of one attention backend on this machine's default device, one JSON line a case.

Usage: python attention_errors.py cudnn
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from attention_reference import random_inputs, reference

from lark_jax.students.attention.dispatch import attend

CASES = ((1, 1, 1, 64), (7, 4, 1, 128), (129, 7, 1, 64), (383, 8, 2, 128), (513, 4, 4, 80), (1_025, 14, 2, 64))


def main(backend: str) -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        for case in CASES:
            errors = errors_of(backend, dtype, *case)
            described = {"platform": jax.default_backend(), "dtype": dtype.__name__, "case": case}
            print(json.dumps(described | errors | {"epsilon": float(jnp.finfo(dtype).eps)}))


def errors_of(backend, dtype, *case):
    """Largest error of the output against float64, and of the gradients against float32 blockwise, relative."""
    rounded = [x.astype(dtype) for x in random_inputs(*case, scale=1.0)]
    exact = [x.astype(jnp.float32) for x in rounded]
    out = jax.jit(lambda *qkv: attend(*qkv, backend=backend))(*rounded)

    def gradients(backend, qkv):
        def loss(*qkv):
            return (attend(*qkv, backend=backend).astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)

    pairs = zip(gradients(backend, rounded), gradients("blockwise", exact), strict=True)
    return {
        "out": relative_error(out, reference(*rounded)),
        "gradient": max(relative_error(ours, expected) for ours, expected in pairs),
    }


def relative_error(ours, expected):
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(ours - expected).max() / (np.abs(expected).max() + 1e-2))


if __name__ == "__main__":
    main(sys.argv[1])
