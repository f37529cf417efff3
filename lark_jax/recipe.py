"""The paper's recipe for all three of its students: the defaults of `lark_jax.config` and the few values that differ.

"C.3" and the like are appendices of the LARK paper. docs/config.md lists every field with its default, meaning and
source. A config file starts from here and sets the three paths.
"""

from ml_collections import ConfigDict

from lark_jax.config import Experiment, as_config_dict


def paper_recipe() -> ConfigDict:
    """Every field but workdir, student.path and pool.path, which remain to be set."""
    config = as_config_dict(Experiment)
    config.select.methods = ("lark", "random", "grape")  # 5.1; docs/methods.md has all methods of C.2
    config.select.budgets = (1, 3)  # 5.1 "Selection budgets"
    config.evaluate.engine = "vllm"  # C.3 "Software stack"
    # C.4; from the Hugging Face hub (accept GPQA's terms there), or from files: "aime24=data/aime24.json"
    config.evaluate.benchmarks = ("aime24", "amc83", "gpqa_diamond", "math500")
    config.evaluate.repetition_penalty = 1.1  # C.3 "Reproducibility"; C.4 does not list it
    return config
