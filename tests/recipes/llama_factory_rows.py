"""The rows that LLaMA-Factory reads from a selection; runs in its virtualenv. FOLDER STUDENT DATASET OUT."""

import json
import sys

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

if __name__ == "__main__":
    folder, student, dataset, out = sys.argv[1:]
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": student,
        "template": "qwen",
        "dataset_dir": folder,
        "dataset": dataset,
        "cutoff_len": 4_096,
        "output_dir": f"{out}.training",
        "overwrite_cache": True,
    }
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    rows = get_dataset(template, model_args, data_args, training_args, stage="sft", tokenizer=tokenizer)
    with open(out, "w", encoding="utf-8") as stream:
        json.dump([[row["input_ids"], row["labels"]] for row in rows["train_dataset"]], stream)
