"""Llama-3.2-3B, the paper's recipe (Appendix C.3 and C.4).

    python -m lark_jax.run --config=configs/llama3b.py \
        --config.pool.path=pool.jsonl --config.student.path=/checkpoints/Llama-3.2-3B

Hardware in the paper: 8 x A100-80GB; 3 to 5 hours per fine-tuning run, 15 minutes per benchmark (C.3).
Numbers in the paper (Table 1, LARK, average Acc@5 of four benchmarks): 26.29 ± 2.66 (B=1) and 29.13 ± 2.72 (B=3).
The base checkpoint has no chat template: llama3_chat.jinja, next to this file, is the public Llama 3 format. The paper
does not say which template it used for this student.
We have not run this configuration, for lack of such hardware. See docs/verification.md, "Limits".
"""

from pathlib import Path

from ml_collections import ConfigDict

from lark_jax.recipe import paper_recipe


def get_config() -> ConfigDict:
    config = paper_recipe()
    config.workdir = "runs/llama3b"
    config.student.path = "meta-llama/Llama-3.2-3B"  # a folder, or this hub id, which is downloaded
    config.student.chat_template = str(Path(__file__).resolve().with_name("llama3_chat.jinja"))
    config.pool.path = "data/pool.jsonl"
    return config
