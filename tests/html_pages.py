"""Checks HTML pages: everything that a browser would silently repair, and every dead link, is a fault."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lark_jax.report import ReportContent
from lark_jax.report.page import plates_of, render_page

VOID_TAGS = {"meta", "use", "path", "link", "img", "br", "hr", "input"}
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
BLOCKS = HEADINGS | {
    "details", "div", "dl", "figure", "footer", "header", "main", "nav", "ol", "p", "pre", "section", "table", "ul",
}  # fmt: skip
OF_PHRASES = HEADINGS | {"p", "pre", "code", "em", "mark", "a", "summary"}  # a browser ends a <p> before a block
PARENTS = {
    "li": {"ul", "ol"}, "tr": {"thead", "tbody"}, "td": {"tr"}, "th": {"tr"}, "caption": {"table"},
    "thead": {"table"}, "tbody": {"table"}, "figcaption": {"figure"}, "summary": {"details"},
}  # fmt: skip


def page_of(content: ReportContent) -> str:
    """The report's page as HTML."""
    return render_page(content, plates_of(content))


class PageReader(HTMLParser):
    """Collects tags with attributes, and texts; `faults` lists errors of the markup."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.faults: list[str] = []
        self._open: list[tuple[str, list[str]]] = []  # with the tags of its children so far
        self._heading = 0
        self.feed(page)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag, _ in self._open]
        self.faults += [f"id {found!r} twice" for found in sorted(self.ids) if self._ids().count(found) > 1]
        self.faults += [f"no id {name!r}, a label" for name in self._labels() if name not in self.ids]

    @property
    def ids(self) -> set[str]:
        return set(self._ids())

    @property
    def links(self) -> list[str]:
        return [link for _, attributes in self.tags if (link := attributes.get("href"))]

    def _ids(self) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get("id")) is not None]

    def _labels(self) -> list[str]:
        return [name for _, attributes in self.tags for name in (attributes.get("aria-labelledby") or "").split()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)
        if tag not in VOID_TAGS:
            self._open.append((tag, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID_TAGS:
            return
        if not self._open or self._open[-1][0] != tag:
            inner = f"<{self._open[-1][0]}> is open" if self._open else "nothing is open"
            self.faults.append(f"</{tag}> where {inner}")
            return
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def _take(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        parent, siblings = self._open[-1] if self._open else ("", [])
        around = {name for name, _ in self._open}
        if len(dict(attrs)) != len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag in BLOCKS and around & OF_PHRASES:
            self.faults.append(f"<{tag}> within {sorted(around & OF_PHRASES)}")
        if tag in PARENTS and parent not in PARENTS[tag]:
            self.faults.append(f"<{tag}> in <{parent}>")
        if parent == "details" and (tag == "summary") != (not siblings):
            self.faults.append(f"<{tag}> is child {len(siblings) + 1} of <details>")
        if tag in HEADINGS:
            self._check_heading(int(tag[1]))
        siblings.append(tag)

    def _check_heading(self, level: int) -> None:
        if level > self._heading + 1:
            self.faults.append(f"<h{level}> after <h{self._heading}>")
        self._heading = level


def faults_of_pages(folder: Path) -> list[str]:
    """The errors in all pages below `folder`, including dead links between them."""
    pages = {path.resolve(): PageReader(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    faults = []
    for path, page in pages.items():
        where = path.relative_to(folder.resolve()).as_posix()
        faults += [f"{where}: {fault}" for fault in page.faults]
        for link in page.links:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if parts.scheme or parts.netloc or target not in pages:
                faults.append(f"{where}: link to {link}, which is no page here")
            elif parts.fragment and parts.fragment not in pages[target].ids:
                faults.append(f"{where}: link to {link}, where nothing has this id")
    return faults
