"""The frame of the entry points: parsing, help, one-line errors, exit statuses."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lark_jax.errors import PoolError
from lark_jax.runtime.command import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, Arguments, Command, Flag, guarded

CONFIG = "from lark_jax.recipe import paper_recipe\n\n\ndef get_config():\n    return paper_recipe()\n"
FLAGS = (
    Flag("out", "Folder for everything.", required=True, path=True),
    Flag("share", "A share of it.", 0.5),
    Flag("kind", "Kind.", "small", choices=("small", "large")),
    Flag("log", "File for messages.", path=True),
)


def command(
    config: tuple[str, ...] | None = None, config_required: bool = False, flags: tuple[Flag, ...] = FLAGS
) -> tuple[Command, list[Arguments]]:
    seen: list[Arguments] = []

    def act(arguments: Arguments) -> int:
        seen.append(arguments)
        return 7

    frame = Command(
        "lark_jax.some",
        "--out=FOLDER",
        "Does it.",
        act,
        flags,
        positional=config is None,
        config=config,
        config_required=config_required,
    )
    return frame, seen


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def test_flags_come_in_any_order_and_paths_have_their_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    frame, seen = command()
    assert frame.main(["a", "--out", "~/x", "b=c", "--kind=large"]) == 7
    assert seen[0].positional == ("a", "b=c")
    assert seen[0].flags == {"out": "/home/me/x", "share": 0.5, "kind": "large", "log": None}
    assert seen[0].config == {}


def test_overrides_reach_the_configuration(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(config_file.parent))
    frame, seen = command(config=(), config_required=True)
    overrides = ["--config.finetune.packing", "--config.seed", "3", "--config.select.budgets=2"]
    assert frame.main([f"--config=~/{config_file.name}", *overrides, "--out=x"]) == 7
    values = seen[0].config
    assert (values["finetune"]["packing"], values["seed"], values["select"]["budgets"]) == (True, 3, (2,))
    assert seen[0].raw[1:] == (*overrides, "--out=x")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config.evaluate.benchmarks=aime24=/data/a,math500=/data/b"], ["aime24=/data/a", "math500=/data/b"]),
        (["--config.evaluate.benchmarks=/a.jsonl,/b.jsonl,"], ["/a.jsonl", "/b.jsonl"]),
        (["--config.evaluate.benchmarks", "math500,own=x.jsonl"], ["math500", "own=x.jsonl"]),
        (["--config.evaluate.benchmarks=a.jsonl", "--config.evaluate.benchmarks=b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["--config.evaluate.benchmarks=('a.jsonl', 'b.jsonl')"], ["a.jsonl", "b.jsonl"]),
        (["--config.evaluate.benchmarks=one.jsonl"], ["one.jsonl"]),
    ],
)
def test_a_list_of_texts_may_hold_anything_but_commas(flags: list[str], expected: list[str], config_file: Path) -> None:
    frame, seen = command(config=())
    assert frame.main([f"--config={config_file}", *flags, "--out=x"]) == 7
    assert list(seen[0].config["evaluate"]["benchmarks"]) == expected


def test_an_unknown_override_of_the_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    frame, _ = command(config=())
    assert frame.main(["--config.pool.only_corect=True", "--out=x"]) == 2
    message = "error: config.pool.only_corect: unknown field; did you mean pool.only_correct?\n"
    assert capsys.readouterr().err == message


def test_the_recipe_stands_in_for_an_optional_configuration() -> None:
    frame, seen = command(config=())
    assert frame.main(["--config.pool.only_correct=True", "--out=x"]) == 7
    assert seen[0].config["pool"]["only_correct"]
    assert seen[0].config["evaluate"]["engine"] == "vllm"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--oat=x"], "Unknown command line flag 'oat'. Did you mean: out ?; python -m lark_jax.some --help lists"),
        ([], "--config: missing, a file such as configs/tiny.py; usage: python -m lark_jax.some --out=FOLDER"),
        (["--config=FILE"], "--out: missing; usage: python -m lark_jax.some --out=FOLDER"),
        (["--config=FILE", "--out=x", "--kind=tall"], "--kind=tall: value should be one of <small|large>"),
        (["--config=FILE", "--out=x", "--share=half"], "--share=half"),
        (["--config=FILE", "--out=x", "y"], "unexpected arguments: y; "),
        (["--config=nowhere.py", "--out=x"], "--config=nowhere.py: no such file"),
        (["--config=FILE", "--config.finetune.lerning_rate=1"], "unknown field; did you mean finetune.learning_rate?"),
        (["--config=FILE", "--config.seed.x=1"], "config.seed: not a section, so there is no config.seed.x"),
        (["--config=FILE", "--config.seed=one"], "config.seed: expected int, got 'one'"),
        (
            ["--config=FILE", "--config.finetune.lora_rank=x"],
            "config.finetune.lora_rank: expected int, got 'x'",
        ),
        (["--config=FILE", "--config.finetune=3"], "config.finetune: expected a section with fields, got '3'"),
        (["--config=FILE", "--config.synthetic.num_problems=3"], "FILE has no section synthetic"),
        (["--config=", "--out=x"], "--config=: no such file"),
        (["--config=.", "--out=x"], "--config=.: no such file"),
        (["--config=FILE:variant", "--out=x"], "FILE:variant: TypeError: get_config() takes 0 positional arguments"),
        (["--config=FILE", "--out=x", "--log="], "--log=: expected a path, got an empty one"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_what_to_do(
    arguments: list[str], expected: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configured = any("config" in argument for argument in arguments)
    frame, seen = command(config=() if configured or not arguments else None, config_required=True)
    assert frame.main([argument.replace("FILE", str(config_file)) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected.replace("FILE", str(config_file)) in line
    assert seen == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config():\n    return None\n", "get_config() has to return a ConfigDict, got NoneType"),
        ("def get_config():\n    return {}\n", "get_config() has to return a ConfigDict, got dict"),
        ("def get_config(:\n", "SyntaxError"),
        ("import nothing_of_this_name\n", "No module named 'nothing_of_this_name'"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError"),
        ("def get_config():\n    open('/nowhere/file')\n", "/nowhere/file"),
    ],
)
def test_a_config_file_that_does_not_load_is_one_line(
    text: str, expected: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text(text)
    frame, _ = command(config=(), flags=())
    assert frame.main([f"--config={config_file}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --config={config_file}: ")
    assert expected in line


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_has_usage_flags_and_the_fields_that_the_command_reads(
    asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    frame, seen = command(config=("pool",))
    assert frame.main(["nonsense", asked]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m lark_jax.some --out=FOLDER\n\nDoes it.\n")
    for part in ("--out=VALUE\n      Folder for everything. (required)", "(default: 0.5)", "One of small, large."):
        assert part in text
    assert "  pool.only_correct=False\n      Leave out records whose `correct` is false." in text
    assert "pool.columns.prompt" in text
    assert "finetune" not in text
    assert seen == []
    whole, _ = command(config=())
    whole.main(["--help"])
    assert "  finetune.batch_size=64\n" in capsys.readouterr().out


def raises(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PoolError("pool.jsonl:1:\n  no messages"), 2, "error: pool.jsonl:1: no messages\n"),
        (PermissionError(13, "Permission denied", "file"), 2, "error: [Errno 13] Permission denied: 'file'\n"),
        (BrokenPipeError(32, "Broken pipe"), 2, "error: [Errno 32] Broken pipe\n"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "interrupted; run the same command again to continue\n"),
    ],
)
def test_what_the_user_can_fix_is_one_line(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(raises(error)) == status
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(raises(ZeroDivisionError()))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_ends_the_command_quietly(unbuffered: str) -> None:
    program = "from lark_jax.runtime.command import guarded; import sys; sys.exit(guarded(lambda: print('x' * 10**6)))"
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, env=environment, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_BROKEN_PIPE, "")
