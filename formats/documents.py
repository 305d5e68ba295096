"""Documents as people keep them, as titled paragraphs: text, Markdown, HTML, PDF, JSON lines.

A file that cannot be read is a ValueError with the reason, so that others are still read.
"""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from formats.corpora import passage_of, split_contents
from infra.files import packing, parse_object, replace_surrogates

HIDDEN = {"script", "style", "nav", "header", "footer", "template", "noscript", "svg", "button",
          "select"}  # tags of HTML whose text is no text of the document
BLOCKS = {"p", "div", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table", "section", "article",
          "main", "blockquote", "pre", "br", "hr", "figure", "figcaption", "title", "aside"}
HEADING = re.compile(r"h[1-6]")
# Settings of YAML between two lines; text between two rules is text.
FRONT_MATTER = re.compile(r"---\s*\n([\w-]+:.*?\n)?(---|\.\.\.)\s*(\n|\Z)", re.DOTALL)
TITLE = re.compile(r"""^title:[ \t]*(["']?)(.+?)\1[ \t]*$""", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~)")
LINK = re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)")


class Section(NamedTuple):
    title: str
    paragraphs: list[str]


def read_document(path: Path) -> list[Section]:
    """The sections of a file that hold any text."""
    kind = "" if path.suffix[1:].isdigit() else path.suffix.lower()  # MPL-2.0, say
    reader = READERS.get(kind)
    if reader is None:
        raise ValueError(f"{path.suffix} files are not read")
    sections = [Section(title, [p for p in paragraphs if p.strip()])
                for title, paragraphs in reader(path)]
    sections = [section for section in sections if section.paragraphs]
    if not sections:
        raise ValueError("it holds no text")
    return sections


def read_characters(path: Path) -> str:
    if kind := packing(path):
        raise ValueError(f"it is {kind}, not text")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    if "\0" in text:
        raise ValueError("it is not text")
    return replace_surrogates(text)


def split_paragraphs(text: str) -> list[str]:
    """Parts between blank lines."""
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text)]


def joined_title(document: str, heading: str) -> str:
    """How a section is called: "Document: Section", or one of them where they are equal."""
    return document if heading in ("", document) else f"{document}: {heading}"


def read_text(path: Path) -> list[Section]:
    return [Section(path.stem, split_paragraphs(read_characters(path)))]


def read_markdown(path: Path) -> list[Section]:
    """Sections at headings; a block of code is one paragraph; of links their text is left.

    What stands before the text between lines of "---" is no text, but may name the document.
    """
    sections, document, fence, text = [Section("", [""])], "", "", read_characters(path)
    if front := FRONT_MATTER.match(text):
        text = text[front.end() :]
        if title := TITLE.search(front[1] or ""):
            document = title[2]
    for line in text.splitlines():
        paragraphs = sections[-1].paragraphs
        if match := FENCE.match(line.lstrip()):
            fence = "" if fence == match[1] else fence or match[1]
        if not fence and (heading := re.match(r"#{1,6}\s+(.+?)\s*#*$", line)):
            document = document or heading[1]
            sections.append(Section(LINK.sub(r"\1", heading[1]), [""]))
        elif line.strip() or fence:
            paragraphs[-1] += line + "\n" if fence else LINK.sub(r"\1", line) + "\n"
        elif paragraphs[-1]:
            paragraphs.append("")
    document = LINK.sub(r"\1", document) or path.stem
    return [Section(joined_title(document, title), [p.strip("\n") for p in paragraphs])
            for title, paragraphs in sections]


class _Html(HTMLParser):
    """Collects sections; of a page with a <main> or an <article>, those inside it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.title, self.heading = "", ""
        self.sections = [Section("", [""])]
        self.open: list[str] = []  # tags that change how text is read
        self.main_from: int | None = None  # the section with which <main> began

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag in ("main", "article") and self.main_from is None and not self.is_hidden():
            self.main_from = len(self.sections)
            self.sections.append(Section("", [""]))
        if tag in BLOCKS or HEADING.fullmatch(tag):
            self.sections[-1].paragraphs.append("")
        if tag in HIDDEN or tag in ("pre", "title", "main") or HEADING.fullmatch(tag):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:  # what was opened within it ends with it
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]
        if HEADING.fullmatch(tag) and not self.is_hidden():
            self.sections.append(Section(" ".join(self.heading.split()), [""]))
            self.heading = ""
        elif tag == "main":
            self.open.append("footer")  # what follows is no text of the document
        elif tag in BLOCKS:
            self.sections[-1].paragraphs.append("")

    def is_hidden(self) -> bool:
        return not HIDDEN.isdisjoint(self.open)

    def handle_data(self, data: str) -> None:
        if self.is_hidden():
            return
        if "title" in self.open:
            self.title += data
        elif any(HEADING.fullmatch(tag) for tag in self.open):
            self.heading += data
        else:
            text = data if "pre" in self.open else re.sub(r"\s+", " ", data)
            self.sections[-1].paragraphs[-1] += text


def read_html(path: Path) -> list[Section]:
    parser = _Html()
    parser.feed(read_characters(path))
    parser.close()
    document = " ".join(parser.title.split()) or path.stem
    sections = parser.sections[parser.main_from or 0 :]
    return [Section(joined_title(document, title), [p.strip() for p in paragraphs])
            for title, paragraphs in sections]


def read_pdf(path: Path) -> list[Section]:
    """A section for each page. Lines are joined, and words that a line's end divides."""
    try:
        import pypdf  # here, because it is optional
    except ImportError as error:
        raise ValueError("PDF needs pypdf (pip install pypdf)") from error
    try:
        reader = pypdf.PdfReader(path)
        title = str((reader.metadata or {}).get("/Title") or "").strip() or path.stem
        pages = [page.extract_text() for page in reader.pages]
    except Exception as error:  # of another library, on any file
        raise ValueError(f"pypdf: {type(error).__name__}: {str(error)[:100]}") from error
    sections = []
    for number, text in enumerate(pages, 1):
        text = re.sub(r"(?<=\w)-\n(?=[a-z])", "", replace_surrogates(text))
        paragraphs = [" ".join(part.split()) for part in split_paragraphs(text)]
        sections.append(Section(f"{title}, page {number}", paragraphs))
    return sections


def read_json_lines(path: Path) -> list[Section]:
    """A section for each row that is a passage of a corpus (formats/corpora.py)."""
    sections = []
    for number, line in enumerate(read_characters(path).split("\n"), 1):
        if line.strip():
            where = f"line {number}"
            row = parse_object(line, where)
            name, contents = passage_of({"id": str(number), **row}, where)
            title, text = split_contents(contents)
            sections.append(Section(title.strip('"') or f"{path.stem} {name}",
                                    split_paragraphs(text)))
    return sections


READERS: dict[str, Callable[[Path], list[Section]]] = {
    **dict.fromkeys(("", ".txt", ".text", ".rst"), read_text),
    **dict.fromkeys((".md", ".markdown"), read_markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    ".pdf": read_pdf, ".jsonl": read_json_lines,
}  # by the end of a file's name
