"""scripts/compare_with_torch.py on a small random student: how near float32 and bfloat16 are, and what top-50 costs."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lark_jax.config import SyntheticConfig
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.runtime import files

torch = pytest.importorskip("torch")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
Rows = dict[str, dict[str, Any]]
SMALL = SyntheticConfig(num_problems=2, num_test_problems=2, num_pretrain_problems=60, hidden_size=64, num_layers=2)


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pool.jsonl and the checkpoint `random`."""
    folder = tmp_path_factory.mktemp("compare")
    write_synthetic(SMALL, 11, folder)
    _script("make_random_student").write_random_student(
        folder / "student", folder / "random", hidden=64, layers=2, seed=3
    )
    return folder


@pytest.fixture(scope="module")
def rows(material: Path) -> Rows:
    """The report's rows by scorer, with --against=published."""
    torch.set_num_threads(1)
    out = material / "report.json"
    pool = f"--pool={material / 'pool.jsonl'}"
    arguments = [f"--student={material / 'random'}", pool, "--max_length=128", "--against=published", f"--out={out}"]
    assert _script("compare_with_torch").main(arguments) == 0
    return {row["scorer"]: row for row in files.read_json(out)["rows"]}


def test_float32_agrees_with_torch_to_rounding_and_selects_the_same_sets(rows: Rows) -> None:
    ours = rows["float32"]
    assert ours["num_tokens"] > 1_000
    assert 0 < ours["tokens"]["cross_entropy"]["max_abs"] < 1e-4
    assert all(ours["tokens"][field]["max_abs"] < 1e-5 for field in ("brier", "target_prob", "wrong_concentration"))
    assert ours["tokens"]["rank"]["equal"] > 0.999
    assert all(found["shift_max"] < 1e-3 for found in ours["trajectories"].values())
    assert ours["selected_jaccard"] == 1.0


def test_bfloat16_is_further_away_but_not_far(rows: Rows) -> None:
    for field in ("cross_entropy", "brier"):
        differences = [rows[name]["tokens"][field]["max_abs"] for name in ("float32", "bfloat16")]
        assert 2 * differences[0] < differences[1] < 0.2


def test_the_published_top_50_softmax_shifts_the_brier_score_and_nothing_else(rows: Rows) -> None:
    published, ours = (rows[name]["trajectories"] for name in ("published top-50", "float32"))
    assert published.pop("brier")["shift_mean"] > 1e-3 > 10 * ours["brier"]["shift_max"]
    assert all(found["shift_max"] == 0 for found in published.values())


def test_a_pool_of_which_nothing_can_be_rendered_ends_in_one_line_and_status_2(
    material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--student={material / 'random'}", f"--pool={material / 'pool.jsonl'}", "--max_length=4"]
    assert _script("compare_with_torch").main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "nothing to compare" in lines[0]
    assert "prompt_fills_max_length" in lines[0]
