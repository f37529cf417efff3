"""The recipe that the paper uses for all three students, field by field with its source.

"C.3" and the like are appendices of the LARK paper. A config file starts from here and sets the three paths.
"""

import dataclasses

from ml_collections import ConfigDict, config_dict

from lark_jax.config.experiment import LORA_TARGETS, ColumnsConfig


def paper_recipe() -> ConfigDict:
    """Everything but workdir, student.path and pool.path, which stay to be set."""
    config = ConfigDict()
    config.workdir = ""
    config.seed = 42  # C.3 "Reproducibility"
    config.stages = ("score", "select", "finetune", "export", "evaluate", "report")

    config.student = ConfigDict()
    config.student.path = ""
    config.student.chat_template = config_dict.placeholder(str)  # Jinja file; None: the tokenizer's own template
    config.student.max_length = 32_768  # tokens; C.3 "Maximum sequence length", the same in every stage

    config.pool = ConfigDict()
    config.pool.path = ""  # 5,000 problems x 33 trajectories of 11 teachers; C.1
    config.pool.on_bad_record = "error"
    config.pool.columns = ConfigDict()  # the source's names for these fields; None: the same
    for field in dataclasses.fields(ColumnsConfig):
        config.pool.columns[field.name] = config_dict.placeholder(str)
    config.pool.only_correct = False  # C.1: the paper's pool holds correct ones only
    config.pool.duplicate_answers = "keep"  # and report; or "skip", "error"
    config.pool.teacher = config_dict.placeholder(str)  # of records that name none
    config.pool.split = config_dict.placeholder(str)  # of a dataset with several
    config.pool.file_names = config_dict.placeholder(str)  # folder of .json lists; e.g. "{teacher}_{rollout}.json"
    config.pool.exclude = ("selected_by_rsr/*",)  # what the published pool (C.1) holds beside the 33 files

    config.score = ConfigDict()
    config.score.tokens_per_batch = 32_768  # per device; one row of full length
    config.score.dtype = "bfloat16"  # C.3 "Precision"; statistics are float32
    config.score.metrics = ()  # further columns for methods that need them, e.g. "rule_quality"; computed alone
    config.score.vocab_chunk = 4_096  # vocabulary rows; memory only, results do not depend on it
    config.score.attention = "auto"  # kernel by platform and row length; C.3: FlashAttention-2
    config.score.natural_context = 4  # C.2, m of Local Naturalness
    config.score.natural_split = config_dict.placeholder(str)  # C.2 says "sentence-level"; None: our rule
    config.score.parameters = "auto"  # "replicated" where they fit, else "gathered" layer by layer

    config.score.judge = ConfigDict()  # C.2 "LLM-judged Quality"; asked only where score.metrics has "judge"
    config.score.judge.engine = "openai"  # a server; "vllm": a folder, in evaluate.python
    config.score.judge.model = config_dict.placeholder(str)  # C.2: Qwen3-32B
    config.score.judge.server = config_dict.placeholder(str)  # base URL, http://HOST:PORT/v1
    config.score.judge.key_variable = config_dict.placeholder(str)  # environment variable with the server's key
    config.score.judge.prompt_file = config_dict.placeholder(str)  # TOML; None: our wording of C.2's rubric
    config.score.judge.max_tokens = 1_024  # of an answer; ours
    config.score.judge.temperature = 0.0  # ours
    config.score.judge.structured_output = "schema"  # or "json_object", "none", as far as the server has it
    config.score.judge.template_arguments = "{}"  # C.2, non-thinking mode of Qwen3: '{"enable_thinking": false}'
    config.score.judge.attempts = 3  # until an answer is of use
    config.score.judge.concurrency = 32  # requests under way
    config.score.judge.requests_per_minute = config_dict.placeholder(float)
    config.score.judge.timeout = 600.0  # seconds for one request
    config.score.judge.retries = 5  # of a request, after failures that may pass
    config.score.judge.tensor_parallel = 1  # GPUs; engine "vllm"

    config.select = ConfigDict()
    config.select.methods = ("lark", "random", "grape")  # 5.1; docs/methods.md has all of C.2
    config.select.budgets = (1, 3)  # 5.1 "Selection budgets"
    config.select.score = config_dict.placeholder(str)  # with weighting: one more method, e.g. "g_hat" x "uniform"
    config.select.weighting = config_dict.placeholder(str)
    config.select.temperature = 1.0  # of the weightings softmax and kl; the paper names no value
    config.select.resample = 0  # copies per problem in an unweighted file for other trainers; ours, 0: no such file

    config.finetune = ConfigDict()
    config.finetune.learning_rate = 1e-5  # C.3, main experiments (5e-6 for 500 trajectories)
    config.finetune.epochs = 5  # C.3
    config.finetune.batch_size = 64  # trajectories; C.3: 8 GPUs x 1 x accumulation 8
    config.finetune.warmup_fraction = 0.05  # C.3, linear; then cosine decay
    config.finetune.max_grad_norm = 1.0  # C.3
    config.finetune.b1 = 0.9  # C.3, PyTorch's AdamW defaults
    config.finetune.b2 = 0.999  # C.3
    config.finetune.eps = 1e-8  # C.3
    config.finetune.weight_decay = 0.0  # C.3
    config.finetune.dtype = "bfloat16"  # C.3 "Precision"; masters, moments and gradient sums are float32
    config.finetune.tokens_per_batch = 32_768  # per device and micro-batch; C.3: per-device batch 1
    config.finetune.packing = False  # C.3 packs: less padding, but attention needs a kernel that honours segment ids
    config.finetune.attention = "auto"  # kernel by platform, row length and packing; C.3: FlashAttention-2
    config.finetune.remat = "block"  # C.3 "gradient checkpointing"; or none, attention, offload: preflight compares
    config.finetune.vocab_chunk = 4_096
    config.finetune.checkpoint_every = 50  # steps; ours: the paper does not say
    config.finetune.keep_checkpoints = 2  # the newest; ours
    config.finetune.held_out_fraction = 0.0  # of the problems; ours: the paper trains on all and holds out none
    config.finetune.evaluate_every = 50  # steps; of no effect without held-out problems
    config.finetune.loggers = ()  # "tensorboard", "wandb"; metrics.jsonl is always written
    config.finetune.lora_rank = 0  # C.3 trains every parameter; > 0: an adapter (wants a larger learning_rate)
    config.finetune.lora_alpha = 16.0  # of no effect at rank 0, like the next
    config.finetune.lora_targets = LORA_TARGETS  # all linear layers of the decoder

    config.evaluate = ConfigDict()
    config.evaluate.engine = "vllm"  # C.3 "Software stack"
    config.evaluate.python = config_dict.placeholder(str)  # interpreter of vLLM's own virtualenv; None: this one
    # C.4; by name from the Hugging Face hub (GPQA's terms are accepted there), or from files: "aime24=data/aime24.json"
    config.evaluate.benchmarks = ("aime24", "amc83", "gpqa_diamond", "math500")
    config.evaluate.system_prompts = "by_kind"  # C.4 "System prompts", in our wording
    config.evaluate.include_base = True  # Table 1, BaseModel
    config.evaluate.samples = 5  # C.4, Acc@5
    config.evaluate.seeds = (0, 1, 2)  # C.4: three decoding seeds
    config.evaluate.temperature = 0.6  # C.4
    config.evaluate.top_p = 0.95  # C.4
    config.evaluate.repetition_penalty = 1.1  # C.3 "Reproducibility"; C.4 does not list it
    config.evaluate.max_tokens = 32_768  # C.4, generated tokens
    config.evaluate.grader = "math_verify"  # "paper": the plain rules of C.4
    config.evaluate.tensor_parallel = 1  # C.3: one GPU per shard
    config.evaluate.engines = config_dict.placeholder(int)  # side by side; None: as many as there are GPUs for
    config.evaluate.server = config_dict.placeholder(str)  # engine "openai": base URL, http://HOST:PORT/v1
    config.evaluate.server_model = config_dict.placeholder(str)  # name there; "{student}" becomes base, lark_B3, ...
    config.evaluate.server_key_variable = config_dict.placeholder(str)  # environment variable with the server's key
    config.evaluate.server_concurrency = 64  # requests under way
    config.evaluate.server_timeout = 3_600.0  # seconds for one sample
    config.evaluate.server_retries = 5  # after failures that may pass

    config.mesh = ConfigDict()
    config.mesh.data = -1  # all devices: of this process where the student fits there, else of all processes
    config.mesh.tensor = 1

    config.distributed = ConfigDict()  # several processes as one run; never an input of a stage
    config.distributed.start = "auto"  # as SLURM, Open MPI, a TPU slice or a Kubernetes job say; "never": alone
    config.distributed.coordinator = config_dict.placeholder(str)  # host:port of process 0, where nothing says it
    config.distributed.num_processes = config_dict.placeholder(int)
    config.distributed.process_id = config_dict.placeholder(int)
    config.distributed.connect_timeout = 300  # seconds for all processes to come
    config.distributed.lost_timeout = 60  # seconds of silence after which a process counts as dead
    return config
