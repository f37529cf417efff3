"""The shipped configurations are the paper's recipe with paths, and Llama's chat template renders the public format."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from lark_jax.config import Experiment, experiment_from_mapping
from lark_jax.pool.records import Message, Trajectory
from lark_jax.recipe import paper_recipe
from lark_jax.rendering.chat import ChatFormat, load_chat_format, render_prompt, render_trajectory

CONFIG_FILES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.py"))
STUDENTS = {"qwen7b": "Qwen/Qwen2.5-7B", "qwen1_5b": "Qwen/Qwen2.5-1.5B", "llama3b": "meta-llama/Llama-3.2-3B"}


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"shipped_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def experiment_of(path: Path) -> Experiment:
    return experiment_from_mapping(load_module(path).get_config())


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_shows_its_command(path: Path) -> None:
    assert experiment_of(path).workdir == f"runs/{path.stem}"
    header = load_module(path).__doc__ or ""
    assert f"--config=configs/{path.name}" in header
    assert ("the paper's recipe (Appendix C.3 and C.4)" in header) == (path.stem in STUDENTS)


@pytest.mark.parametrize("path", [path for path in CONFIG_FILES if path.stem in STUDENTS], ids=lambda path: path.stem)
def test_the_papers_students_differ_from_the_recipe_only_in_their_paths(path: Path) -> None:
    experiment = experiment_of(path)
    assert experiment.student.path == STUDENTS[path.stem]
    recipe = paper_recipe()
    recipe.workdir, recipe.pool.path = experiment.workdir, experiment.pool.path
    recipe.student.path, recipe.student.chat_template = experiment.student.path, experiment.student.chat_template
    assert dataclasses.asdict(experiment_from_mapping(recipe)) == dataclasses.asdict(experiment)


# --- the chat template of Llama ----------------------------------------------------------------------------------


BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
SPECIAL_TOKENS = [BOS, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", EOT]
CONVERSATION = (
    Message("system", " Think.\n"),  # white space at both ends has to stay
    Message("user", "What is 2 + 2?  "),
    Message("assistant", "\n<think>\nTwo and two.\n</think>\n\nThe answer is \\boxed{4}. é {{ x }}\n"),
)
PROMPT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n Think.\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?  <|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes and Llama 3's special tokens; like the base checkpoint it prepends BOS and has no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    folder = tmp_path_factory.mktemp("llama")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def template_file() -> Path:
    (path,) = [path for path in CONFIG_FILES if path.stem == "llama3b"]
    template = experiment_of(path).student.chat_template
    assert template is not None
    assert Path(template).is_absolute(), "found from any working directory"
    return Path(template)


@pytest.fixture(scope="module")
def chat(llama_folder: Path, template_file: Path) -> ChatFormat:
    return load_chat_format(llama_folder, template_file)


def decoded(chat: ChatFormat, ids: object) -> str:
    return str(chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def test_llama_prompt_is_the_public_format_with_one_bos(chat: ChatFormat) -> None:
    ids = render_prompt(chat, CONVERSATION[:-1])
    bos_id = chat.tokenizer.convert_tokens_to_ids(BOS)
    assert ids[0] == bos_id
    assert ids.count(bos_id) == 1
    assert decoded(chat, ids) == PROMPT
    assert chat.frozen_date is None


def test_llama_target_is_the_untrimmed_answer_and_the_end_of_turn(chat: ChatFormat) -> None:
    item = Trajectory("p", "c", "t", CONVERSATION, "pool.jsonl:1")
    rendered = render_trajectory(chat, item, 1000)
    assert rendered.prompt_tokens.tolist() == render_prompt(chat, CONVERSATION[:-1])
    assert decoded(chat, rendered.target_tokens) == CONVERSATION[-1].content + EOT
    assert rendered.target_tokens[-1] == chat.end_of_turn_id == chat.tokenizer.convert_tokens_to_ids(EOT)
    assert chat.tokenizer.convert_tokens_to_ids(BOS) not in rendered.target_tokens
    assert (chat.lead, chat.tail) == ("", "")


def test_transformers_renders_the_same_tokens(chat: ChatFormat, llama_folder: Path, template_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    messages = [{"role": message.role, "content": message.content} for message in CONVERSATION]
    options = {"chat_template": template_file.read_text(encoding="utf-8"), "return_dict": False}
    ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    assert ids == render_prompt(chat, CONVERSATION[:-1])
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert whole == PROMPT + CONVERSATION[-1].content + EOT
