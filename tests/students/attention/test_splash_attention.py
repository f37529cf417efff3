"""The Pallas kernel for TPUs: its blocks, and its program compiled for TPUs without one."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attention_base import Case, inputs_of, output_and_gradients, reference

from lark_jax.students.attention import splash as module
from lark_jax.students.attention.splash import splash_attention

TOKENS_AT_FULL_SIZE = 32_768


def test_blocks_as_they_are_used_give_the_same():
    """The properties of `test_backends` are tested with small blocks."""
    case = Case(600, batch=1)
    inputs = inputs_of(case)
    run = output_and_gradients(functools.partial(splash_attention, interpret=True), case)
    np.testing.assert_allclose(run(*inputs)[0], reference(*inputs)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("time", [*range(1, 2_000, 61), 8_191, 8_192, 8_193, 20_001, 32_768, 32_769, 131_072])
def test_blocks_are_large_and_pad_little(time):
    block = module._block_size(time)
    padded = -(-time // block) * block
    assert block % 128 == 0
    largest = 512 if time <= 8_192 else 1_024
    assert min(time, largest // 2) <= block <= largest
    assert padded - time < min(largest // 2, max(time, 128))


COMPILE = f"""
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lark_jax.students.attention.dispatch import attend

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
head_dim, packed, window = int(sys.argv[2]), sys.argv[3] == "packed", int(sys.argv[4]) or None
mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
rows = PartitionSpec("data")

def loss(q, k, v, segments):
    out = attend(q, k, v, segment_ids=segments if packed else None, window=window, backend="splash")
    return (out.astype(jnp.float32) ** 2).sum()

def argument(*shape, dtype=jnp.bfloat16):
    sharding = NamedSharding(mesh, rows)
    return jax.ShapeDtypeStruct((len(devices), {TOKENS_AT_FULL_SIZE}, *shape), dtype, sharding=sharding)

arguments = [argument(heads, head_dim) for heads in (28, 4, 4)] + [argument(dtype=jnp.int32)]
gradient = jax.grad(loss, argnums=(0, 1, 2))
gradient = jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
compiled = jax.jit(gradient).lower(*arguments).compile()
print(json.dumps([compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (extra `test`) is not installed")
@pytest.mark.parametrize(
    ("topology", "head_dim", "packed", "window"),
    [("v5e:2x2", 128, "packed", 0), ("v5p:2x2x1", 128, "rows", 4_096), ("v6e:2x2", 64, "rows", 0)],
)
def test_compiles_forward_and_backward_for_tpus_at_full_length(topology, head_dim, packed, window):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topology, str(head_dim), packed, str(window)],
        cwd=Path(__file__).resolve().parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    temporary_bytes, program = json.loads(done.stdout.splitlines()[-1])
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}{'_segmented' * (packed == 'packed')}" in program
    # A few copies of q (256 MiB at head_dim 128) at most; the scores would take 112 GiB.
    assert temporary_bytes < 1.3 * 2**30
