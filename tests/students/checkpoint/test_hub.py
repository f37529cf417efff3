from pathlib import Path

import huggingface_hub
import pytest

from lark_jax.errors import CheckpointError
from lark_jax.students import loaded_files, local_folder
from lark_jax.students.checkpoint.hub import _snapshot


@pytest.fixture(autouse=True)
def nothing_is_resolved_yet():
    _snapshot.cache_clear()
    yield
    _snapshot.cache_clear()


def test_an_existing_folder_is_returned_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    assert local_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./student", "a/b/c", "~/student", Path("student"), "tests/no-such-student"]
)
def test_a_missing_folder_is_not_mistaken_for_a_hub_id(path, monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    with pytest.raises(CheckpointError, match="no such folder, and not a Hugging Face hub id"):
        local_folder(path)


def test_loaded_files_are_weights_configuration_and_tokenizer(tmp_path):
    loaded = ["chat_template.jinja", "config.json", "merges.txt", "model-1-of-1.safetensors", "tokenizer.json"]
    for name in (*loaded, "README.md", ".lock.json", "events.log", "training_args.bin"):
        (tmp_path / name).touch()
    assert [file.name for file in loaded_files(tmp_path)] == loaded


@pytest.mark.parametrize("folder", ["additional_chat_templates", "chat_templates"])
def test_named_chat_templates_count(tmp_path, folder):
    for name in ("model.safetensors", f"{folder}/default.jinja", f"{folder}/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert loaded_files(tmp_path) == (tmp_path / folder / "default.jinja", tmp_path / "model.safetensors")


def test_every_file_counts_in_a_folder_without_safetensors(tmp_path):
    for name in ("config.json", "judge.gguf"):
        (tmp_path / name).touch()
    assert [file.name for file in loaded_files(tmp_path)] == ["config.json", "judge.gguf"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        local_folder(tmp_path / "model.safetensors")


def test_a_download_is_announced_first_and_leaves_pickles_out(tmp_path, monkeypatch, capsys):
    announced = []

    def download(hub_id, *, repo_type, allow_patterns, local_files_only):
        announced.append(capsys.readouterr().err)
        assert (hub_id, repo_type) == ("some-org/some-student", "model")
        assert not local_files_only
        assert "*.safetensors" in allow_patterns
        assert not any("bin" in pattern or pattern == "*" or pattern.endswith(".py") for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder("some-org/some-student") == tmp_path
    assert "some-org/some-student" in announced[0]
    assert "from the Hugging Face hub" in announced[0]


def test_a_process_resolves_a_hub_id_once(tmp_path, monkeypatch):
    asked = []

    def download(hub_id, **_):
        asked.append(hub_id)
        return str(tmp_path / str(len(asked)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder("some-org/some-student") == local_folder("some-org/some-student") == tmp_path / "1"
    assert local_folder("some-org/another") == tmp_path / "2"
    assert asked == ["some-org/some-student", "some-org/another"]


def test_offline_is_named_and_nothing_is_downloaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        local_folder("some-org/some-student")
    assert "Hugging Face" not in capsys.readouterr().err


def test_a_failed_download_is_one_line(monkeypatch):
    def download(*_, **__):
        raise OSError("first line\nsecond line")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"some-org/some-student: .*first line second line"):
        local_folder("some-org/some-student")
