"""Names of hardware: the cloud's, ours, and the devices that libtpu makes of them."""

import json
import os
import subprocess
import sys

import pytest
from budget_cases import libtpu_version

from lark_jax.errors import ConfigError
from lark_jax.preflight.hardware import CARDS, GPU_SHARE_VARIABLES, TPU_CHIPS
from lark_jax.preflight.requests import ENVIRONMENT
from lark_jax.preflight.topologies import parse_topology


@pytest.fixture(autouse=True)
def default_memory_share(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in GPU_SHARE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


# Google's documentation: v4 and v5p are named by TensorCores, two per chip; v5e and v6e by chips.
@pytest.mark.parametrize(
    ("name", "canonical", "devices", "hosts"),
    [
        ("v4-8", "v4:2x2x1", 4, 1),
        ("v4-64", "v4:2x4x4", 32, 8),
        ("v5p-8", "v5p:2x2x1", 4, 1),
        ("v5p-16", "v5p:2x2x2", 8, 2),
        ("v5p-32", "v5p:2x2x4", 16, 4),
        ("v5p-64", "v5p:2x4x4", 32, 8),
        ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v5p:2x2x2", "v5p:2x2x2", 8, 2),
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-8", "v5e:2x4", 8, 1),
        ("v5e-16", "v5e:4x4", 16, 4),
        ("v5litepod-32", "v5e:4x8", 32, 8),
        ("V6E-8", "v6e:2x4", 8, 1),
        ("v6e-256", "v6e:16x16", 256, 64),
        ("a100-80gb:8", "a100-80gb:8", 8, 1),
        ("a100-40gb", "a100-40gb:1", 1, 1),
        ("h100:16", "h100:16", 16, 2),
        ("b200:4", "b200:4", 4, 1),
    ],
)
def test_names_give_devices_and_hosts(name: str, canonical: str, devices: int, hosts: int) -> None:
    topology = parse_topology(name)
    assert (topology.name, topology.num_devices, topology.num_hosts) == (canonical, devices, hosts)
    assert parse_topology(canonical) == topology
    assert topology.one_host().num_devices == topology.devices_per_host == devices // hosts
    assert topology.one_host().num_hosts == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", "expected TPUs"),
        ("a100:8", "a100-80gb"),
        ("v7-8", "v5p:2x2x2"),
        ("v5e", "v5p:2x2x2"),
        ("v5p-7", "two per chip"),
        ("v5p-12", "power of two"),
        ("v5p-4", "from 8"),
        ("v5e-0", "from 1"),
        ("v5e-2", "power of two"),
        ("v5e:4x4x4", "2 numbers"),
        ("v5p:4x4", "3 numbers"),
        ("v5e:3x3", "even"),
        ("v5e:0x4", "2 numbers"),
        ("h100:12", "whole hosts"),
        ("h100:0", "number of cards"),
        ("h100:x", "number of cards"),
    ],
)
def test_an_unknown_name_is_refused_in_one_line(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as caught:
        parse_topology(name)
    assert "\n" not in str(caught.value)
    assert f"--topology={name}:" in str(caught.value)


@pytest.mark.parametrize("name", CARDS)
def test_jax_takes_three_quarters_of_a_card_unless_told_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CARDS[name].memory_bytes
    assert parse_topology(name).memory_bytes == int(0.75 * whole)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert parse_topology(name).memory_bytes == int(0.9 * whole)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "90%")
    with pytest.raises(ConfigError, match="XLA_CLIENT_MEM_FRACTION='90%'"):
        parse_topology(name)


COUNT_DEVICES = """
import json, sys
from jax.experimental import topologies
from lark_jax.preflight.topologies import parse_topology
found = {}
for name in sys.argv[1:]:
    devices = topologies.get_topology_desc(**parse_topology(name).description()).devices
    found[name] = [len(devices), len({device.process_index for device in devices})]
print(json.dumps(found))
"""


@pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (the extra 'preflight')")
def test_libtpu_counts_the_same_devices_and_hosts() -> None:
    names = [
        *(f"{chip}-{size}" for chip in ("v5e", "v6e") for size in (1, 4, 8, 16, 64)),
        *(f"{chip}-{size}" for chip in ("v4", "v5p") for size in (8, 16, 64)),
    ]
    assert {name.split("-")[0] for name in names} == set(TPU_CHIPS)
    found = subprocess.run(
        [sys.executable, "-c", COUNT_DEVICES, *names],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {name: [parse_topology(name).num_devices, parse_topology(name).num_hosts] for name in names}
    assert json.loads(found.stdout.splitlines()[-1]) == expected
