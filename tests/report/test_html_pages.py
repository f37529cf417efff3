"""The page checker finds the faults that it looks for."""

from pathlib import Path

import pytest
from html_pages import PageReader, faults_of_pages

FAULTS = {
    "<p>a": "<p> is never closed",
    "<p><em>a</p></em>": "</p> where <em> is open",
    "</p>": "</p> where nothing is open",
    "<p><div></div></p>": "<div> within ['p']",
    "<pre><ul><li>a</li></ul></pre>": "<ul> within ['pre']",
    "<li>a</li>": "<li> in <>",
    "<table><tr></tr></table>": "<tr> in <table>",
    "<details><p>a</p></details>": "<p> is child 1 of <details>",
    "<details><summary>a</summary><summary>b</summary></details>": "<summary> is child 2 of <details>",
    "<h1>a</h1><h3>b</h3>": "<h3> after <h1>",
    '<p id="a" id="b"></p>': "<p> has an attribute twice",
    '<p id="a"></p><p id="a"></p>': "id 'a' twice",
    '<section aria-labelledby="a"></section>': "no id 'a', a label",
}


@pytest.mark.parametrize("markup", FAULTS)
def test_faulty_markup_is_found(markup: str) -> None:
    assert FAULTS[markup] in PageReader(markup).faults


def test_sound_markup_has_no_faults() -> None:
    page = PageReader(
        '<h1 id="a">a</h1><h2>b</h2><br><details><summary>c <code>d</code></summary><p>e</p></details>'
        "<table><caption>f</caption><thead><tr><th>g</th></tr></thead></table><h2>h</h2>"
    )
    assert page.faults == []


@pytest.mark.parametrize(
    ("link", "sound"),
    [
        ("#here", True),
        ("#there", False),
        ("sub/a%20b.html", True),
        ("sub/a%20b.html#there", True),
        ("sub/a%20b.html#here", False),
        ("sub/c.html", False),
        ("https://example.org/", False),
    ],
)
def test_dead_links_are_found(link: str, sound: bool, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(f'<p id="here"><a href="{link}">a</a></p>')
    (tmp_path / "sub" / "a b.html").write_text('<p id="there"><a href="../index.html">b</a></p>')
    assert (faults_of_pages(tmp_path) == []) is sound
