"""Links from pages to files of the repository outside ``docs/``: these become part of the site, so that it stands by itself.

A file ``benchmarks/README.md`` of the repository is the page ``repository/benchmarks/README.md`` of the site; what it links to
follows. A linked folder is its README.md, or a list of its files.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from docs.hooks import ROOT

DOCS = "docs"
PREFIX = "repository"
FENCE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?P<after>(?:\s+\"[^\"]*\")?\))")
LISTING = "listing.md"


def site_path(path: PurePosixPath) -> PurePosixPath:
    """Where a file of the repository is on the site."""
    return path.relative_to(DOCS) if path.is_relative_to(DOCS) else PREFIX / path


def repository_path(uri: str) -> PurePosixPath:
    """The inverse of ``site_path``."""
    path = PurePosixPath(uri)
    return path.relative_to(PREFIX) if path.is_relative_to(PREFIX) else DOCS / path


def resolve(page: PurePosixPath, target: str) -> PurePosixPath | None:
    """The file of the repository that a relative link of a page means; a folder's README.md or listing; None for other links.

    Args:
        page: file of the repository.
        target: of the link, without anchor.
    """
    if ":" in target or target.startswith("/"):
        return None
    path = PurePosixPath(os.path.normpath(page.parent / target))
    if path.parts[:1] == ("..",):
        return None
    if (ROOT / path).is_dir():
        return path / ("README.md" if (ROOT / path / "README.md").is_file() else LISTING)
    return path


def text_of(path: PurePosixPath) -> str:
    """Contents of a Markdown file of the repository, or the list of a folder's files."""
    if path.name != LISTING:
        return (ROOT / path).read_text(encoding="utf-8")
    names = sorted(f.name for f in (ROOT / path).parent.iterdir() if f.is_file() and not f.name.startswith("."))
    return "\n".join([f"# {path.parent}", "", *(f"- [{name}]({name})" for name in names)]) + "\n"


def outside_code(text: str) -> Iterator[tuple[bool, str]]:
    """Parts of a Markdown text: (False, code block) or (True, anything else)."""
    end = 0
    for match in FENCE.finditer(text):
        yield True, text[end : match.start()]
        yield False, match.group()
        end = match.end()
    yield True, text[end:]


def links(page: PurePosixPath, text: str) -> Iterator[PurePosixPath]:
    """Files of the repository that a page links to."""
    for prose, part in outside_code(text):
        for match in LINK.finditer(part) if prose else ():
            path = resolve(page, match["target"])
            if path is not None and (path.name == LISTING or (ROOT / path).is_file()):
                yield path


def linked_files(pages: list[str]) -> list[PurePosixPath]:
    """Files of the repository outside ``docs/`` that the site needs, from all that its pages link to, directly or not.

    Args:
        pages: of the site, relative to ``docs/``.
    """
    waiting = [DOCS / PurePosixPath(page) for page in pages]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        if page.suffix != ".md":
            continue
        for path in links(page, text_of(page)):
            if path not in seen:
                seen.add(path)
                waiting.append(path)
    return sorted(path for path in seen if not path.is_relative_to(DOCS))


def rewrite_links(uri: str, text: str) -> str:
    """A page's text with links as they are on the site.

    Args:
        uri: of the page on the site, 'cost.md' or 'repository/benchmarks/README.md'.
        text: Markdown.
    """
    page = repository_path(uri)

    def rewritten(match: re.Match[str]) -> str:
        path = resolve(page, match["target"])
        if path is None or (path.name != LISTING and not (ROOT / path).is_file()):
            return match.group()  # mkdocs says what is wrong with it
        target = os.path.relpath(site_path(path), PurePosixPath(uri).parent)
        return f"{match['before']}{Path(target).as_posix()}{match['anchor'] or ''}{match['after']}"

    return "".join(LINK.sub(rewritten, part) if prose else part for prose, part in outside_code(text))
