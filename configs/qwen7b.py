"""Qwen2.5-7B, the paper's recipe (Appendix C.3 and C.4).

    python -m lark_jax.run --config=configs/qwen7b.py \
        --config.pool.path=pool.jsonl --config.student.path=/checkpoints/Qwen2.5-7B

Hardware in the paper: 8 x A100-80GB; 3 to 5 hours per fine-tuning run, 15 minutes per benchmark (C.3).
Numbers in the paper (Table 1, LARK, average Acc@5 of four benchmarks): 58.01 ± 3.42 (B=1) and 63.74 ± 3.27 (B=3).
We have not run this configuration, for lack of such hardware. See docs/verification.md, "Limits".
"""

from ml_collections import ConfigDict

from lark_jax.recipe import paper_recipe


def get_config() -> ConfigDict:
    config = paper_recipe()
    config.workdir = "runs/qwen7b"
    config.student.path = "Qwen/Qwen2.5-7B"  # a folder, or this hub id, which is downloaded
    config.pool.path = "data/pool.jsonl"
    return config
