"""A hook of MkDocs for `make docs`: it adds all files to which docs/ links, so that every link leads to a page.

README.md, CONTRIBUTING.md, CHANGELOG.md and tests/README.md become pages of their own. A file outside docs/ to which a
page links (an example, a module) becomes a page that shows its text; a folder becomes a list of its files.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "tests/README.md": "tests.md",
}
"""Pages of the site that are not in docs/, by their path in the repository."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")
IMAGES = (".png", ".svg")
"""Images in docs/. MkDocs copies them unchanged."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json", "": "text", ".txt": "text"}
LIST_ITEM = re.compile(r"(\d+\. |[*-] )\S")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and all files to which a page links, until none is missing."""
    waiting = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in done or path.endswith(IMAGES) or not (ROOT / path).exists():
            continue  # strict mode reports a dead link
        done.add(path)
        text = markdown_of(path)
        waiting += linked_from(path, text)
        page = page_of(path)
        if (old := files.get_file_from_path(page)) is not None:
            files.remove(old)
        files.append(File.generated(config, page, content=site_text(path, text)))
    return files


def page_of(path: str) -> str:
    """The page that shows ``path`` of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/") and path.endswith((".md", *IMAGES)):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def markdown_of(path: str) -> str:
    file = ROOT / path
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir() if entry.is_file())
        return "\n".join([f"# {path}", "", *(f"* [`{name}`]({file.name}/{name})" for name in names), ""])
    content = file.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return f"# {path}\n\nThis file is not text; it has {len(content)} bytes.\n"
    if file.suffix == ".md":
        return text
    fence = "~~~~"
    return f"# {path}\n\n{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text}\n{fence}\n"


def linked_from(path: str, text: str) -> list[str]:
    if not is_prose(path):
        return []
    return [target_of(path, link) for link in LINK.findall(text)]


def target_of(path: str, link: str) -> str:
    """Return the path in the repository to which ``link`` on the page ``path`` leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def site_text(path: str, text: str) -> str:
    """Return the page's text with links between pages of the site, and with lists as Python-Markdown reads them."""
    if not is_prose(path):
        return text
    folder = posixpath.dirname(page_of(path))

    def on_the_site(match: re.Match[str]) -> str:
        target = target_of(path, match[1])
        return posixpath.relpath(page_of(target), folder or ".") if (ROOT / target).exists() else match[1]

    return indented(LINK.sub(on_the_site, text))


def is_prose(path: str) -> bool:
    return path.endswith(".md") or (ROOT / path).is_dir()


def indented(text: str) -> str:
    """Rewrite lists for Python-Markdown, which is stricter than CommonMark.

    Python-Markdown requires four spaces before the continuation of an item; CommonMark requires as many as the item's
    marker is long. It also requires an empty line before a list and after an item of several blocks.
    """
    lines: list[str] = []
    width, is_fenced, has_blocks = 0, False, False
    for line in text.splitlines():
        if line.startswith("```"):
            is_fenced, width = not is_fenced, 0
        item = None if is_fenced else LIST_ITEM.match(line)
        if item is not None:
            if lines and lines[-1] and (has_blocks or not width):
                lines.append("")
            width, has_blocks = len(item[1]), False
        elif line and not line.startswith(" " * max(width, 1)):
            width, has_blocks = 0, False
        elif width and not line:
            has_blocks = True
        lines.append(" " * (4 - width) + line if line and width and item is None else line)
    return "\n".join(lines) + "\n"
