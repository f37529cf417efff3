"""The configuration sections `finetune`, `mesh` and `distributed`."""

import dataclasses

from lark_jax.config.fields import (
    DISTINCT,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    SOME_DISTINCT,
    Check,
    Section,
    at_least,
    field,
    one_of,
)
from lark_jax.config.scoring import ATTENTION_BACKENDS, DTYPES

TRAINING_LOGGERS = ("tensorboard", "wandb")  # keys of finetuning.loggers.LOGGERS
REMAT_CHOICES = ("none", "attention", "block", "offload")  # keys of students.remat.POLICIES
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of students.decoder


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Section, name="finetune"):
    """Weighted supervised fine-tuning with AdamW."""

    learning_rate: float = field(
        1e-5,
        "Peak, after warm-up; cosine decay to zero follows.",
        paper="C.3, main experiments (5e-6 for 500 trajectories)",
        check=POSITIVE,
    )
    epochs: int = field(5, "Passes over the selection.", unit="epochs", paper="C.3", check=at_least(1))
    batch_size: int = field(
        64,
        "Batch size of an optimizer step, over all devices.",
        unit="trajectories",
        paper="C.3: 8 GPUs x 1 x accumulation 8",
        check=at_least(1),
    )
    warmup_fraction: float = field(0.05, "Share of all steps with linear warm-up.", paper="C.3", check=FRACTION)
    max_grad_norm: float = field(1.0, "Limit for the global gradient norm.", paper="C.3", check=POSITIVE)
    b1: float = field(0.9, "AdamW's decay of the first moment.", paper="C.3, PyTorch's defaults", check=FRACTION)
    b2: float = field(0.999, "AdamW's decay of the second moment.", paper="C.3", check=FRACTION)
    eps: float = field(1e-8, "AdamW's epsilon.", paper="C.3", check=POSITIVE)
    weight_decay: float = field(0.0, "AdamW's weight decay.", paper="C.3", check=NON_NEGATIVE)
    dtype: str = field(
        "bfloat16",
        "Type of the computation; parameters, moments and gradient sums stay float32.",
        paper='C.3 "Precision"',
        check=one_of(*DTYPES),
    )
    tokens_per_batch: int = field(
        32_768,
        "Limit per device and micro-batch, padding included.",
        unit="tokens",
        paper="C.3: per-device batch 1",
        check=at_least(1),
    )
    packing: bool = field(
        False,
        "Several trajectories in one row, kept apart by segment ids: less padding, but attention needs a kernel that "
        "honours segment ids.",
        paper="C.3 packs",
    )
    attention: str = field(
        "auto",
        'Attention kernel; "auto" chooses by platform, row length and packing.',
        paper="C.3: FlashAttention-2",
        check=one_of("auto", *ATTENTION_BACKENDS),
    )
    remat: str = field(
        "block",
        "What the backward pass recomputes or offloads to save memory; preflight compares them.",
        paper='C.3 "gradient checkpointing"',
        check=one_of(*REMAT_CHOICES),
    )
    vocab_chunk: int = field(4_096, "Vocabulary rows per pass of the loss.", unit="rows", check=at_least(1))
    checkpoint_every: int = field(
        50, "Optimizer steps between checkpoints.", unit="steps", paper="not given; ours", check=at_least(1)
    )
    keep_checkpoints: int = field(
        2,
        "The newest checkpoints kept; with a held-out set the best one is kept too.",
        unit="checkpoints",
        paper="not given; ours",
        check=at_least(1),
    )
    held_out_fraction: float = field(
        0.0,
        "Share of the problems that are never trained on, to measure their loss.",
        paper="trains on all problems",
        check=FRACTION,
    )
    evaluate_every: int = field(
        50, "Optimizer steps between measurements of the held-out loss.", unit="steps", check=at_least(1)
    )
    loggers: tuple[str, ...] = field(
        (),
        "Loggers in addition to metrics.jsonl, which is always written.",
        check=DISTINCT,
        items=one_of(*TRAINING_LOGGERS),
    )
    lora_rank: int = field(
        0,
        "Rank of the adapter that is trained instead of the weights (it needs a larger learning_rate); 0: none, every "
        "parameter is trained.",
        paper="C.3 trains every parameter",
        check=at_least(0),
    )
    lora_alpha: float = field(16.0, "The adapter's part is multiplied by lora_alpha / lora_rank.", check=POSITIVE)
    lora_targets: tuple[str, ...] = field(
        LORA_TARGETS, "Linear layers with an adapter, by HF's names.", check=SOME_DISTINCT, items=one_of(*LORA_TARGETS)
    )

    def check(self) -> None:
        honoured = not self.packing or self.attention != "cudnn"
        self.require(honoured, "attention", "a backend that honours the segment ids of packed rows")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section, name="mesh"):
    """How devices are arranged.

    With several processes, scoring has one mesh per process, over that process's devices, if the student fits there;
    then processes need not communicate. If it does not fit, or if data x tensor is the number of all devices of all
    processes, one mesh spans them all.
    """

    data: int = field(
        -1,
        "Devices along which rows (and, in fine-tuning, parameters) are split; -1: all that tensor leaves.",
        unit="devices",
        check=Check("-1 or an integer >= 1", lambda value: value == -1 or value >= 1),
    )
    tensor: int = field(1, "Devices along which single layers are split.", unit="devices", check=at_least(1))


@dataclasses.dataclass(frozen=True)
class DistributedConfig(Section, name="distributed"):
    """The processes of one run. Results do not depend on them, so they are never an input of a stage."""

    start: str = field(
        "auto",
        'Whether this is one of several processes: "auto" asks SLURM, Open MPI, the TPU slice or the Kubernetes job, '
        '"never" means one process.',
        check=one_of("auto", "never"),
    )
    coordinator: str | None = field(
        None, "Address of process 0, host:port; with the next two fields, for launchers that are not recognised."
    )
    num_processes: int | None = field(None, "Number of processes.", unit="processes", check=at_least(1))
    process_id: int | None = field(None, "This process, from 0 to num_processes - 1.", check=at_least(0))
    connect_timeout: int = field(
        300, "How long processes wait for each other at the start.", unit="seconds", check=at_least(1)
    )
    lost_timeout: int = field(
        60, "Silence after which a process counts as dead and the others end.", unit="seconds", check=at_least(1)
    )

    def check(self) -> None:
        together = ("coordinator", "num_processes", "process_id")
        given = [name for name in together if getattr(self, name) is not None]
        for name in together if given else ():
            self.require(name in given, name, f"a value, since {given[0]} is given")
        if self.coordinator is not None and self.num_processes is not None and self.process_id is not None:
            host, _, port = self.coordinator.rpartition(":")
            self.require(bool(host) and port.isdecimal(), "coordinator", "host:port")
            allowed = f"an integer from 0 to num_processes - 1 = {self.num_processes - 1}"
            self.require(self.process_id < self.num_processes, "process_id", allowed)
