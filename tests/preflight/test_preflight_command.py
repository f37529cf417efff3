"""`python -m lark_jax.preflight`: what it prints, its exit status, its errors."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from budget_cases import libtpu_version
from student_shapes import STUDENT_SHAPES

from lark_jax.config import REMAT_CHOICES
from lark_jax.preflight.__main__ import COMMAND
from lark_jax.runtime.command import EXIT_USER_ERROR

PARTS = ("arguments", "output", "temporary", "code")
ROOT = Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(libtpu_version() is None, reason="libtpu is not installed (the extra 'preflight')")
has_cuda = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (12, 13))


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Preflight = Callable[..., Done]


@pytest.fixture
def preflight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Preflight:
    """The command on a student's architecture, in this process; what it compiles, it compiles in others."""

    def run(student: str, *flags: str) -> Done:
        config = tmp_path / f"{student}.json"
        config.write_text(json.dumps(STUDENT_SHAPES[student]), encoding="utf-8")
        arguments = [f"--config={ROOT / 'configs' / 'qwen7b.py'}", f"--architecture={config}", *flags]
        if not any(flag.startswith("--config.stages=") for flag in flags):  # several would add up
            arguments.append("--config.stages=score")
        return Done(COMMAND.main(arguments), *capsys.readouterr())

    return run


@needs_libtpu
@pytest.mark.slow
def test_a_student_that_fits(preflight: Preflight, tmp_path: Path) -> None:
    out = tmp_path / "findings.json"
    lengths = "--lengths=300:64,1000:30,2000:5"
    done = preflight("tiny", "--topology=v5e-4", lengths, f"--out={out}", "--config.score.tokens_per_batch=2048")
    assert done.returncode == 0, done.stderr
    assert "on v5e:2x2: 4 x v5e, 1 host" in done.stdout
    assert "FITS," in done.stdout
    assert "assumptions" in done.stdout
    findings = json.loads(out.read_text(encoding="utf-8"))
    assert findings["fits"] is True
    memory = findings["programs"][0]["answer"]["memory"]
    assert memory["total"] == sum(memory[part] for part in PARTS)
    assert findings["programs"][0]["answer"]["attention"] == "splash"
    assert findings["pool"]["rows"] == 99


@needs_libtpu
@pytest.mark.slow
def test_fine_tuning_names_the_fastest_policy_that_fits(preflight: Preflight, tmp_path: Path) -> None:
    out = tmp_path / "findings.json"
    flags = ("--lengths=300:64", f"--out={out}", "--config.stages=select,finetune", "--config.mesh.tensor=2")
    flags = (*flags, "--config.finetune.tokens_per_batch=2048")
    done = preflight("tiny", "--topology=v5e-4", *flags)
    assert done.returncode == 0, done.stderr
    assert "mesh data=2 x tensor=2; attention splash" in done.stdout
    assert "The fastest that fits: --config.finetune.remat=none" in done.stdout
    findings = json.loads(out.read_text(encoding="utf-8"))
    assert "programs" not in findings
    memories = {policy["remat"]: policy["answer"]["memory"] for policy in findings["finetune"]["policies"]}
    assert set(memories) == set(REMAT_CHOICES)
    for memory in memories.values():
        assert memory["resident"] == 2 * memory["parameters"] > 0, "Adam's moments"
        assert memory["total"] == sum(memory[part] for part in (*PARTS, "resident"))


@needs_libtpu
@pytest.mark.slow
def test_one_that_does_not_fit_gets_a_setting_that_was_compiled(preflight: Preflight) -> None:
    settings = ("--config.score.parameters=replicated", "--config.score.vocab_chunk=1024")
    done = preflight("qwen2.5-7b", "--topology=v5e-4", "--lengths=32767:8", *settings)
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT, by" in done.stdout
    assert "This was compiled and fits" in done.stdout
    assert "    --config.score.parameters=gathered\n" in done.stdout


@needs_libtpu
def test_one_that_cannot_fit_is_reported(preflight: Preflight) -> None:
    done = preflight("qwen2.5-72b", "--topology=v5e-4", "--lengths=512:4")
    assert done.returncode == 1, done.stderr
    assert "No setting makes it fit" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--topology: missing; usage: "),
        (("--topology=v9-8",), "--topology=v9-8: expected TPUs by layout"),
        (("--topology=v5e-4", "--lengths=many"), "--lengths=many"),
        (("--topology=v5e-4", "--efficiency=0"), "--efficiency=0.0"),
        (("--topology=v5e-4", "--out="), "--out=: expected a path"),
        (("--topology=v5e-4", "--architecture=nowhere"), "nowhere: not a file or folder here"),
        (("--topology=v5e-4", "--config.score.dtype=int8"), "config.score.dtype"),
        (("--topology=v5e-4", "--config.stages=select,report"), "preflight compiles score and finetune"),
        (("--topology=v5e-4", "--config.stages=score,fintune"), "config.stages: expected one of 'prepare'"),
    ],
)
def test_mistakes_end_in_one_line(preflight: Preflight, flags: tuple[str, ...], message: str) -> None:
    done = preflight("tiny", *flags)
    assert done.returncode == EXIT_USER_ERROR
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@needs_libtpu
def test_a_mesh_or_kernel_that_does_not_suit_the_slice_is_refused(preflight: Preflight) -> None:
    done = preflight("tiny", "--topology=v5e-4", "--lengths=512:4", "--config.mesh.tensor=3")
    assert done.returncode == 2
    assert "config.mesh" in done.stderr
    done = preflight("tiny", "--topology=v5e-4", "--lengths=512:4", "--config.score.attention=cudnn")
    assert done.returncode == 2
    assert "cudnn" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(has_cuda, reason="JAX's CUDA plugin is installed here")
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(preflight: Preflight) -> None:
    done = preflight("tiny", "--topology=a100-80gb:8", "--lengths=512:4")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: --topology=a100-80gb:8: no compiler for this hardware is installed: pip install 'lark_jax[gpu]'"
    )


@pytest.mark.skipif(not has_cuda, reason="JAX's CUDA plugin is not installed (the extra 'gpu')")
@pytest.mark.slow
@pytest.mark.parametrize("card", ["a100-40gb", "a100-80gb", "h100", "h200", "b200"])
def test_cards_that_this_machine_does_not_have(preflight: Preflight, tmp_path: Path, card: str) -> None:
    out = tmp_path / "findings.json"
    done = preflight("qwen2.5-7b", f"--topology={card}:8", "--lengths=32767:8", f"--out={out}")
    assert done.returncode == 0, done.stderr
    memory = json.loads(out.read_text(encoding="utf-8"))["programs"][0]["answer"]["memory"]
    assert memory["total"] <= 20 * 2**30
