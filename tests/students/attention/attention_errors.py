"""Program for another process: errors of attention backends on this machine's default device, one JSON line per case.

Usage: python attention_errors.py cudnn triton
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from attention_base import CASES, inputs_of, output_and_gradients, published_cases, reference, supported_cases

from lark_jax.students.attention.dispatch import BACKENDS


def main(backends: list[str]) -> None:
    for backend in backends:
        for case in supported_cases(backend, (*CASES, *published_cases(1_025))):
            for dtype in ("bfloat16", "float16"):
                inputs = inputs_of(case, dtype)
                found = output_and_gradients(BACKENDS[backend].attention, case)(*inputs)
                expected = reference(*inputs, scale=case.scale, window=case.window)
                out, *gradients = (relative_error(*pair) for pair in zip(found, expected, strict=True))
                described = {"platform": jax.default_backend(), "backend": backend, "dtype": dtype, "case": str(case)}
                errors = {"out": out, "gradient": max(gradients), "epsilon": float(jnp.finfo(dtype).eps)}
                print(json.dumps(described | errors))


def relative_error(ours, expected):
    return float(np.abs(np.asarray(ours, np.float64) - expected).max() / (np.abs(expected).max() + 1e-2))


if __name__ == "__main__":
    main(sys.argv[1:])
