"""Tiny random HF checkpoints of every supported family, written by transformers itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hf_families import FAMILIES, SIZES

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Writes a checkpoint: make_checkpoint(family, dtype="float32", max_shard_size="1GB", **config fields)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)

    def make(family: str, dtype: str = "float32", max_shard_size: str = "1GB", **fields: object) -> Path:
        class_name, family_fields = FAMILIES[family]
        config = getattr(transformers, f"{class_name}Config")(**{**SIZES, **family_fields, **fields})
        model = getattr(transformers, f"{class_name}ForCausalLM")(config)
        generator = torch.Generator().manual_seed(int(np.random.default_rng().integers(1 << 40)))
        for name, parameter in model.named_parameters():
            # Large enough that attention is far from uniform and every bias and norm scale matters.
            mean, std = (1.0, 0.3) if name.endswith("norm.weight") else (0.0, 0.3 if "proj" not in name else 0.12)
            parameter.data = torch.normal(mean, std, parameter.shape, generator=generator)
        folder = tmp_path_factory.mktemp(family)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make
