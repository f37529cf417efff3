"""scripts/kill_and_resume.py on a small run: real processes, killed at random moments, end with the same bytes."""

import importlib.util
import random
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_and_resume.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_killed_and_terminated_at_random_moments_it_ends_with_the_bytes_of_an_undisturbed_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))
    differing, lost = script.run(tmp_path, [signal.SIGKILL, signal.SIGTERM], 30, random.Random())
    assert differing == []
    assert lost == 0


def test_another_weight_or_another_line_is_a_difference(script: ModuleType, tmp_path: Path) -> None:
    for name, last in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-52)):
        folder = tmp_path / name
        folder.mkdir()
        np.savez(folder / script.WEIGHTS, first=np.zeros(3), second=np.array([0.5, last]))
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        (folder / "held_out.jsonl").write_text("" if name != "c" else '{"step": 0}\n')
    assert script.differences(tmp_path / "a", tmp_path / "b") == []
    assert script.differences(tmp_path / "a", tmp_path / "c") == ["held_out.jsonl", "second"]
