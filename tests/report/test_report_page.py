"""The page is safe (all text stays text), self-contained, complete and deterministic."""

import dataclasses
import html
import json
import random
import re
import shutil
import string
from pathlib import Path

import pytest
from html_pages import PageReader, faults_of_pages, page_of
from report_parts import evaluated

from lark_jax.evaluation.accuracy import Difference
from lark_jax.evaluation.benchmark_records import Benchmark, BenchmarkProblem
from lark_jax.evaluation.contamination import Audit, Frame, Overlap
from lark_jax.evaluation.samples import GradedSample
from lark_jax.pool.records import SkippedRecord
from lark_jax.report import write_report
from lark_jax.report.comparison import ComparedStudent, compare
from lark_jax.report.content import LongText, ReportContent, Section, ShownAnswer, StageSummary
from lark_jax.report.losses import CurvePoint, LossCurve
from lark_jax.report.style import Plate, new_figure
from lark_jax.report.table import Table
from lark_jax.report.table_one import PairedDifference

HOSTILE = (
    '<script>alert(\'x\')</script></style></pre></details>"onmouseover="y" <img src=http://evil.example/a.png> & $a'
)


def section(text: str, **parts: object) -> Section:
    table = Table((f"column {text}",), ((f"cell {text}",),), (False,))
    plate = Plate(new_figure(6.5, 4.0), f"figure {text}", f"caption {text}")
    return Section(f"link {text}", f"title {text}", plate, table, f"table {text}", {"text": text}, **parts)


def full_content(text: str = "plain", skipped: int = 3) -> ReportContent:
    records = tuple(
        SkippedRecord(f"{text} p{i}", f"c{i}", f"pool.jsonl:{i + 1}", f"{text} reason {i}") for i in range(skipped)
    )
    long_text = LongText(f"{text} title", f"{text} reasoning 0")
    return ReportContent(
        title=f"experiment {text}",
        settings={"student.path": text, "select.budgets": "(1, 3)"},
        versions={"jax": f"0.10.2 {text}"},
        students=(evaluated("base", None, 0.25, 0.01, text), evaluated(f"method {text}", 3, 0.41, 0.02, text)),
        curves=(
            LossCurve(
                f"method {text}",
                3,
                tuple(CurvePoint(step, 64 * step, 9_000 * step, loss) for step, loss in ((1, 1.5), (2, 1.2), (3, 1.1))),
                (CurvePoint(0, 0, 0, 1.75), CurvePoint(3, 192, 27_000, 1.25)),
            ),
        ),
        sections={
            "short": section(text),
            "long": section(
                text,
                opening=long_text,
                texts=(long_text, long_text),
                texts_title=f"texts {text}",
                table_title=f"table {text}",
            ),
        },
        answers=(
            ShownAnswer(
                f"student {text}",
                text,
                BenchmarkProblem("1", f"{text} asks", f"{text} 5", "expression"),
                GradedSample("1", 0, 0, f"{text} answers", None, False, "no box", "stop", 1),
            ),
        ),
        stages=(StageSummary(f"score {text}", {f"trajectories {text}": 1234}, records),),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of `full_content`."""
    return write_report(full_content(), tmp_path_factory.mktemp("report")).parent


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(written, tmp_path / "report")


def test_pool_text_never_becomes_markup() -> None:
    plain, hostile = PageReader(page_of(full_content("plain"))), PageReader(page_of(full_content(HOSTILE)))
    assert plain.faults + hostile.faults == []
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert not any(tag == "script" for tag, _ in hostile.tags)
    assert not any(name.startswith("on") for _, attributes in hostile.tags for name in attributes)
    assert f"{HOSTILE} reasoning 0" in "".join(hostile.text)


def test_control_characters_are_replaced() -> None:
    page = page_of(full_content("bell\x07 null\x00 escape\x1b[31m surrogate\ud800 line\r\nbreak"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", page)
    page.encode("utf-8")


def test_page_loads_nothing() -> None:
    page = page_of(full_content())
    for tag, attributes in PageReader(page).tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, name, attributes[name])
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert "default-src 'none'" in page


def test_the_markup_is_sound_and_no_link_is_dead(tmp_path: Path) -> None:
    """With a section of every kind; `test_html_pages.py` shows that faults are seen."""
    overlap = Overlap("math500", "7", "find x", "12", "find x and y", jaccard=0.6, num_near=2)
    asked = Benchmark("arithmetic", (BenchmarkProblem("p 1", "1 + 1?", "2", "number"),), "fingerprint")
    key, texts = ("arithmetic", "p 1"), dict.fromkeys((True, False), "a text")
    students = []
    for name, correct in (("a", True), ("b", False), ("c", False)):
        extracted, reason = ("2", "correct") if correct else (None, "no box")
        sample = GradedSample("p 1", 0, 0, "", extracted, correct, reason, "stop", 1)
        students.append(ComparedStudent(f"{name} 1", name, 3, {key: (sample,)}))
    skipped = tuple(SkippedRecord(f"p{i}", "c", "pool.jsonl:1", "empty: so") for i in range(12))
    content = dataclasses.replace(
        full_content(),
        differences=(PairedDifference("7B", "lark B=3", "base", "math500", 83, Difference(5, 0.1, 0.0, 0.2, 9, 3)),),
        comparison=compare(students, [asked], lambda _, keys: dict.fromkeys(keys, texts)),
        contamination=Audit(1234, Frame("Solve: ", ""), (overlap,)),
        stages=(StageSummary("score", {"trajectories": 9}, skipped), StageSummary("select")),
    )
    page = write_report(content, tmp_path)
    assert faults_of_pages(tmp_path) == []
    links = PageReader(page.read_text(encoding="utf-8")).links
    sections = "results comparison training short long answers contamination records settings".split()
    assert {f"#{name}" for name in sections} <= set(links)
    assert sum("comparisons/" in link for link in links) == 3 * 2


@pytest.mark.parametrize("skipped", [1, 10, 11, 137])
def test_every_skipped_record_is_on_the_page(skipped: int) -> None:
    names = ["".join(random.choices(string.ascii_letters, k=12)) for _ in range(skipped)]
    records = tuple(SkippedRecord(name, f"c-{name}", f"pool.jsonl:{i}", f"why {name}") for i, name in enumerate(names))
    page = page_of(ReportContent("t", stages=(StageSummary("score", {}, records),)))
    for i, name in enumerate(names):
        cells = [name, f"c-{name}", f"pool.jsonl:{i}", f"why {name}"]
        assert re.search(r"\s*".join(f"<td>{re.escape(html.escape(cell))}</td>" for cell in cells), page)
    assert f"{skipped} skipped" in page


def test_a_page_with_very_many_skipped_records_shows_the_first_and_counts_all() -> None:
    reasons = ("prompt_fills_max_length: the prompt has 9 tokens", "empty_answer: remove the record")
    numbers = range(165_000)
    records = tuple(SkippedRecord(f"p{i}", "c", f"pool.jsonl:{i}", reasons[i % 3 > 0]) for i in numbers)
    page = page_of(ReportContent("t", stages=(StageSummary("score", {}, records, "runs/x/score/manifest.json"),)))
    assert len(page) < 1_000_000
    text = " ".join("".join(PageReader(page).text).split())
    assert "165,000 skipped in score, with reasons" in text
    assert "empty_answer 110,000 prompt_fills_max_length 55,000" in text
    last = "The first 1,000 of 165,000 records that score skipped; runs/x/score/manifest.json lists all."
    assert last in text
    assert "p999 c pool.jsonl:999" in text
    assert "p1000" not in text


def test_the_list_of_reasons_is_bounded_too() -> None:
    records = tuple(SkippedRecord(f"p{i}", "c", "", f"reason {max(i, 1)}") for i in range(30))
    text = " ".join(
        "".join(PageReader(page_of(ReportContent("t", stages=(StageSummary("s", {}, records),)))).text).split()
    )
    assert "reason 1 2 reason 2 1" in text
    assert "reason 20 1 9 other reasons 9" in text


def test_equal_content_gives_equal_bytes(written: Path, tmp_path: Path) -> None:
    assert write_report(full_content(), tmp_path) == tmp_path / "index.html"
    figures = ("accuracy.png", "loss.png", "short.png", "long.png")
    names = {"index.html", *figures, "short.json", "long.json"}
    assert {path.name for path in written.iterdir()} == {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert (written / name).read_bytes() == (tmp_path / name).read_bytes()


def test_every_diagnostic_has_a_section_and_files_of_its_figure_and_values(written: Path) -> None:
    page = PageReader((written / "index.html").read_text(encoding="utf-8"))
    for name in ("short", "long"):
        assert f"#{name}" in page.links
        assert name in page.ids
        assert json.loads((written / f"{name}.json").read_text()) == {"text": "plain"}
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = "".join(page.text)
    assert text.count("title plain") == text.count("caption plain") // 2 == 2  # a caption, and a label of its figure
    assert text.count("plain reasoning 0") == 3


def test_the_page_of_an_empty_experiment_says_so(tmp_path: Path) -> None:
    page = write_report(ReportContent("empty"), tmp_path).read_text()
    assert PageReader(page).faults == []
    for sentence in ("No evaluation", "No fine-tuning", "No scores", "No sampled answers", "No stage"):
        assert sentence in page
    assert "<svg" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_an_interrupted_report_leaves_the_old_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (folder / "index.html").read_bytes()

    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("lark_jax.report.page.render_page", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(ReportContent("new"), folder)
    assert (folder / "index.html").read_bytes() == old
    assert not list(folder.glob(".*"))


def test_several_benchmarks_get_one_column_each_and_keep_their_intervals() -> None:
    students = [
        tuple(evaluated(method, budget, 0.4, 0.01, *names) for method, budget in (("base", None), ("lark", 1)))
        for names in (("first set", "second set"), ("first set",))
    ]
    page = page_of(ReportContent("t", students=students[0]))
    assert "first set Acc@5 (n=50)" in page
    assert "second set Acc@5 (n=50)" in page
    assert page.count("30.0 to 50.0") == 4
    assert page_of(ReportContent("t", students=students[1])).count("30.0 to 50.0") == 2


def test_differences_are_shown_with_how_they_were_found() -> None:
    difference = Difference(k=5, mean=0.0716, low=0.012, high=0.131, gained=9, lost=3)
    content = dataclasses.replace(
        full_content(),
        differences=(PairedDifference("qwen7b", "lark B=3", "rsr B=3", "amc83", 83, difference),),
    )
    text = " ".join("".join(PageReader(page_of(content)).text).split())
    assert "Differences on the same problems" in text
    assert "10,000 resamples, drawn for both students together" in text
    for cell in ("lark B=3", "rsr B=3", "+7.2", "+1.2 to +13.1", "Acc@5"):
        assert cell in text
    assert "Differences on the same problems" not in page_of(full_content())
