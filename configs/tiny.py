"""The embedded experiment: the whole pipeline on a synthetic pool and a student of 156,000 parameters.

    make demo        # or: python -m lark_jax.run --config=configs/tiny.py

Hardware: 2 CPU cores, under 10 minutes. Nothing is downloaded: the "prepare" stage writes the problems, the pool,
the tokenizer and the student, which it pre-trains. docs/demo.md shows what came out.
It runs the same code as configs/qwen7b.py, with the same recipe except for the settings below. None of them was chosen
by looking at which selection method does better.
"""

from ml_collections import ConfigDict

from lark_jax.recipe import paper_recipe


def get_config() -> ConfigDict:
    config = paper_recipe()
    config.workdir = "runs/tiny"
    config.stages = ("prepare", *config.stages)

    config.synthetic = ConfigDict()
    config.synthetic.num_problems = 200  # in the pool
    config.synthetic.num_test_problems = 100  # held out: the benchmark
    config.synthetic.rollouts = 3  # per teacher and problem
    config.synthetic.num_pretrain_problems = 12_000  # only for the base student
    config.synthetic.pretrain_epochs = 1
    config.synthetic.pretrain_batch_size = 16  # trajectories per step
    config.synthetic.pretrain_learning_rate = 6e-3
    config.synthetic.hidden_size = 64
    config.synthetic.num_layers = 2
    config.synthetic.num_heads = 2  # head_dim 32, the minimum of vLLM's CPU build
    config.synthetic.num_kv_heads = 1
    config.synthetic.intermediate_size = 256

    prepared = config.get_oneway_ref("workdir") + "/prepare"
    config.student.path = prepared + "/pretrain/student"
    config.student.max_length = 512  # tokens
    config.pool.path = prepared + "/data/pool.jsonl"

    config.score.tokens_per_batch = 8_192
    config.score.dtype = "float32"

    config.finetune.learning_rate = 1.5e-3  # a quarter of the rate in pre-training
    config.finetune.batch_size = 16  # trajectories per step: 200 problems would give too few steps of 64
    config.finetune.dtype = "float32"
    config.finetune.tokens_per_batch = 1_024  # small micro-batches leave few rows empty

    config.evaluate.engine = "auto"
    config.evaluate.benchmarks = (prepared + "/data/arithmetic.jsonl",)
    config.evaluate.system_prompts = "none"  # the problem text carries the instruction, as in the pool
    config.evaluate.repetition_penalty = 1.0  # arithmetic repeats digits
    config.evaluate.max_tokens = 256
    return config
