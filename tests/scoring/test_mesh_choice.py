"""A process scores alone where the student fits its own devices; explicit meshes are taken at their word."""

import jax
import numpy as np
import pytest

from lark_jax.config import MeshConfig
from lark_jax.scoring.mesh_choice import fits_one_process
from lark_jax.scoring.parameter_axes import REPLICATED_SHARE
from lark_jax.students.architecture import Architecture, read_architecture
from lark_jax.students.parameters import parameter_shapes

CONFIG = """{
  "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 512, "hidden_size": 64,
  "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
  "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true
}"""


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("student")
    (folder / "config.json").write_text(CONFIG)
    return read_architecture(folder)


def choice(
    architecture: Architecture, config: MeshConfig, memory: int | None, own: int = 4, layout: str = "auto"
) -> bool:
    devices = jax.devices()
    return fits_one_process(
        architecture,
        config,
        np.float32,
        layout,
        local=devices[:own],
        everywhere=devices,
        device_memory_bytes=memory,
    )


def whole_size(architecture: Architecture) -> int:
    return sum(4 * int(np.prod(shape)) for shape in parameter_shapes(architecture).values())


def test_a_student_that_fits_a_device_needs_no_other_process(architecture: Architecture) -> None:
    assert choice(architecture, MeshConfig(), None)
    assert choice(architecture, MeshConfig(), int(whole_size(architecture) / REPLICATED_SHARE) + 1)


def test_one_that_fits_only_when_split_over_its_own_devices_neither(architecture: Architecture) -> None:
    half = int(0.5 * whole_size(architecture) / REPLICATED_SHARE)
    assert choice(architecture, MeshConfig(), half)
    assert choice(architecture, MeshConfig(tensor=4), half)


def test_replicated_parameters_gain_nothing_from_more_devices(architecture: Architecture) -> None:
    assert choice(architecture, MeshConfig(), 1, layout="replicated")


def test_one_that_its_own_devices_cannot_hold_takes_the_devices_of_all(architecture: Architecture) -> None:
    assert not choice(architecture, MeshConfig(), int(0.2 * whole_size(architecture) / REPLICATED_SHARE))
    assert not choice(architecture, MeshConfig(tensor=4), int(0.2 * whole_size(architecture) / REPLICATED_SHARE))


def test_a_tensor_axis_wider_than_the_own_devices_takes_the_devices_of_all(architecture: Architecture) -> None:
    assert not choice(architecture, MeshConfig(tensor=8), None)
    assert not choice(architecture, MeshConfig(tensor=2), None, own=1)


@pytest.mark.parametrize(("data", "tensor", "alone"), [(4, 1, True), (2, 2, True), (8, 1, False), (4, 2, False)])
def test_explicit_axes_say_which_devices_are_meant(
    architecture: Architecture, data: int, tensor: int, alone: bool
) -> None:
    assert choice(architecture, MeshConfig(data=data, tensor=tensor), 1) == alone


def test_one_process_always_fits_itself(architecture: Architecture) -> None:
    assert choice(architecture, MeshConfig(tensor=8), 1, own=8)
