"""The embedded experiment: the whole pipeline on a synthetic pool and a one-million-parameter student.

    make demo        # or: python -m lark_jax.run --config=configs/tiny.py

Hardware: 2 CPU cores, under 10 minutes. Nothing is downloaded: the "prepare" stage writes the problems, the pool
of four teachers, the tokenizer and the student, which it pre-trains. README shows what came out.
It runs the same code as configs/qwen7b.py; only sizes differ, and the learning rate, since the student is small.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.workdir = "runs/tiny"
    config.seed = 42
    config.stages = ("prepare", "score", "select", "finetune", "export", "evaluate", "report")

    config.synthetic = ConfigDict()
    config.synthetic.num_problems = 200  # in the pool
    config.synthetic.num_test_problems = 100  # held out
    config.synthetic.rollouts = 3  # per teacher and problem: 4 teachers x 3 = 12 trajectories per problem

    prepared = config.get_oneway_ref("workdir") + "/prepare"
    config.student = ConfigDict()
    config.student.path = prepared + "/pretrain/student"
    config.student.chat_template = config_dict.placeholder(str)
    config.student.max_length = 512  # tokens

    config.pool = ConfigDict()
    config.pool.path = prepared + "/data/pool.jsonl"

    config.score = ConfigDict()
    config.score.tokens_per_batch = 8_192
    config.score.dtype = "float32"
    config.score.vocab_chunk = 4_096

    config.select = ConfigDict()
    config.select.methods = ("lark", "random", "grape")
    config.select.budgets = (1, 3)
    config.select.score = config_dict.placeholder(str)
    config.select.weighting = config_dict.placeholder(str)

    config.finetune = ConfigDict()
    config.finetune.learning_rate = 5e-4  # the student is small; the same for every method
    config.finetune.epochs = 5
    config.finetune.batch_size = 16  # trajectories per step: 200 problems give too few steps at 64
    config.finetune.dtype = "float32"
    config.finetune.tokens_per_batch = 4_096
    config.finetune.remat = "none"  # memory is no concern at this size
    config.finetune.checkpoint_every = 50  # steps

    config.evaluate = ConfigDict()
    config.evaluate.engine = "auto"
    config.evaluate.python = config_dict.placeholder(str)
    config.evaluate.benchmarks = (prepared + "/data/benchmark.jsonl",)
    config.evaluate.system_prompts = "none"  # the problem text carries the instruction, as in the pool
    config.evaluate.samples = 5
    config.evaluate.seeds = (0, 1, 2)
    config.evaluate.temperature = 0.6
    config.evaluate.top_p = 0.95
    config.evaluate.max_tokens = 256
    return config
