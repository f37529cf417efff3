from pathlib import Path

import huggingface_hub
import pytest

from lark_jax.errors import CheckpointError
from lark_jax.students import local_folder


def test_an_existing_folder_is_taken_as_it_is(tmp_path, monkeypatch):
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
    assert "fetching" in announced[0]


def test_offline_says_so_and_downloads_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        local_folder("some-org/some-student")
    assert "fetching" not in capsys.readouterr().err


def test_a_failed_download_is_one_line(monkeypatch):
    def download(*_, **__):
        raise OSError("first line\nsecond line")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"some-org/some-student: .*first line second line"):
        local_folder("some-org/some-student")
