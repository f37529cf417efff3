"""Students: `config.json` -> architecture, one decoder, HF checkpoints in and out."""

from lark_jax.students.architecture import Architecture, read_architecture
from lark_jax.students.checkpoint.exporting import export_adapter, export_student, save_new_student
from lark_jax.students.checkpoint.hub import loaded_files, local_folder
from lark_jax.students.checkpoint.loading import load_student, lossless_dtype
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import random_student
from lark_jax.students.sharded import ShardedStudent

__all__ = [
    "Architecture",
    "Decoder",
    "ShardedStudent",
    "export_adapter",
    "export_student",
    "load_student",
    "loaded_files",
    "local_folder",
    "lossless_dtype",
    "random_student",
    "read_architecture",
    "save_new_student",
]
