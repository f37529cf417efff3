"""What `bench_finetuning.py` sends to a contestant and gets back."""

from dataclasses import dataclass

import numpy as np

LEARNING_RATE = 1e-5
PAD_ID = 0


@dataclass(frozen=True)
class Request:
    contestant: str
    student: str  # checkpoint folder
    trajectories: str  # .npz, see `Trajectories`
    dtype: str  # of the computation
    remat: bool  # recompute layers in the backward pass
    tokens_per_batch: int  # for ours, padding included
    vocab_chunk: int  # for ours
    rows_per_batch: int  # for the Trainer
    steps: int  # timed steps, after one that is not timed


@dataclass(frozen=True)
class Trajectories:
    """The trajectories of one optimizer step, concatenated."""

    tokens: np.ndarray  # int32
    lengths: np.ndarray  # tokens of prompt and answer
    prompts: np.ndarray  # tokens of the prompt
    weights: np.ndarray  # w_i of Eq. 1

    @classmethod
    def read(cls, path: str) -> "Trajectories":
        with np.load(path) as arrays:
            return cls(*(arrays[name] for name in ("tokens", "lengths", "prompts", "weights")))

    def split(self) -> list[np.ndarray]:
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


@dataclass(frozen=True)
class Result:
    contestant: str
    seconds: float  # median step
    all_seconds: tuple[float, ...]
    losses: tuple[float, ...]  # of every step, including the first, untimed one
    grad_norms: tuple[float, ...]  # likewise, before clipping
    micro_batches: int  # of a step
    padding: float  # share of the tokens that went through the student
    peak_bytes: int  # of the device, or of the process on a CPU, while training
    resident_bytes: int  # the same before the first step: interpreter, libraries, parameters and moments (ours)
    setup_seconds: float  # first step minus a later one: compilation, warm-up
