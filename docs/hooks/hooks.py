"""mkdocs calls these functions by name while it builds the site; mkdocs.yml lists this file."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mkdocs takes it away again after the import

from docs.hooks import ROOT
from docs.hooks.commands import command_reference
from docs.hooks.equations import EquationError, render_equations
from docs.hooks.repository import LISTING, PREFIX, linked_files, rewrite_links, site_path, text_of
from docs.hooks.tables import GENERATED

MARKER = re.compile(r"^<!-- generated: (?P<name>[\w-]+) -->$", re.MULTILINE)
WIDE_TABLE = re.compile(r"^\|(?:[^|\n]*\|){8,}$", re.MULTILINE)
NO_ALT = re.compile(r'<img (?![^>]*\balt="[^"])[^>]*>')
FETCHED = re.compile(r'<(?:script|img|iframe|link|source)\b[^>]*\b(?:src|href)="(?:https?:)?//[^>]*>')
BOOSTS = {"api/": 0.5, f"{PREFIX}/": 0.2}
"""Weights of pages in the search, by their folder: a guide answers a question before a reference does."""
TEXTS = {**GENERATED, "commands": command_reference}


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to outside ``docs/``."""
    for path in linked_files([file.src_uri for file in files.documentation_pages()]):
        uri = site_path(path).as_posix()
        if path.name == LISTING:
            files.append(File.generated(config, uri, content=text_of(path)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Fill in the generated parts, weigh the page for the search, and point links to where their files are on the site."""

    def generated(match: re.Match[str]) -> str:
        if match["name"] not in TEXTS:
            raise PluginError(f"{page.file.src_uri}: generated: {match['name']}: one of {', '.join(TEXTS)}")
        return TEXTS[match["name"]]()

    boost = next((value for folder, value in BOOSTS.items() if page.file.src_uri.startswith(folder)), 1)
    page.meta.setdefault("search", {"boost": boost})
    text = MARKER.sub(generated, markdown)
    if WIDE_TABLE.search(text):
        page.meta.setdefault("hide", ["toc"])  # its room goes to the table
    return rewrite_links(page.file.src_uri, text)


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Turn equations into MathML; images must say what they show."""
    if image := NO_ALT.search(html):
        raise PluginError(f"{page.file.src_uri}: {image.group()}: an image without a text")
    try:
        return render_equations(html)
    except EquationError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from None


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Hold each page to fetching nothing from elsewhere."""
    if foreign := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: {foreign.group()}: fetched from elsewhere")
    return output
