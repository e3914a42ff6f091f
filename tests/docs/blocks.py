"""Code blocks of Markdown pages: found, and checked by their language."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any

import yaml
from timm.models._factory import parse_model_name

from tests.docs.commands import check_script
from vit_tucker.config.load import load_config
from vit_tucker.sweep.plan import load_sweep

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\s*$")
MARKER = re.compile(r"^\s*<!-- (?P<kind>not run|needs): (?P<reason>.+) -->$")
FILE_NAME = re.compile(r"^# (?P<name>[\w-]+\.yaml)\b")
SHOWN_ONLY = frozenset({"", "text", "latex", "math", "bibtex"})
"""Languages of blocks that show something: output, files, formulas."""


def timm_has_local_dir() -> bool:
    """Whether this timm reads models of a local folder."""
    try:
        return parse_model_name("local-dir:x")[0] == "local-dir"
    except AssertionError:
        return False


def onnx_is_there() -> bool:
    """Whether the packages of the extra [onnx] are installed."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime"))


def transformers_is_there() -> bool:
    """Whether the package of the extra [hf] is installed."""
    return find_spec("transformers") is not None


NEEDS = {
    "timm local-dir": timm_has_local_dir,
    "onnxruntime": onnx_is_there,
    "transformers": transformers_is_there,
}
"""What a block may need, by the name in its comment."""


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        file: of the page.
        line: of its first line of code, from 1.
        language: as named after the fence.
        text: the code, without the fence's indentation.
        skipped: the reason given in a comment before it, "<!-- not run: ... -->", or what it "<!-- needs: ... -->" and is not
            there; None to check it.
    """

    file: Path
    line: int
    language: str
    text: str
    skipped: str | None = None

    @property
    def where(self) -> str:
        """'docs/index.md:12'"""
        return f"{self.file}:{self.line}"


def code_blocks(file: Path, text: str) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    lines = iter(enumerate(text.splitlines(), 1))
    before = ""
    for number, line in lines:
        opening = FENCE.match(line)
        if opening is None:
            before = line if line.strip() else before
            continue
        indent, code = len(opening["indent"]), []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            code.append(inner[indent:])
        marker, before = MARKER.match(before), ""
        met = marker is not None and marker["kind"] == "needs" and NEEDS[marker["reason"]]()
        skipped = None if marker is None or met else marker["reason"]
        yield Block(file, number + 1, opening["language"], "\n".join(code) + "\n", skipped)


def check_page(blocks: list[Block], namespace: dict[str, Any]) -> None:
    """Run and check all blocks of a page in the current folder: files that it shows first, then the rest in order.

    Args:
        blocks: of the page.
        namespace: of its Python blocks, one for all of them.

    Raises:
        AssertionError: a block that says something wrong; names the place. Whatever a Python block raises.
    """
    for block in blocks:
        if block.language == "python":
            compiled(block)  # also those that are only shown
    checked = [block for block in blocks if block.skipped is None]
    for block in checked:
        name = FILE_NAME.match(block.text)
        if block.language == "yaml" and name is not None:
            Path(name["name"]).write_text(block.text)
    for block in checked:
        if block.language == "python":
            exec(compiled(block), namespace)
        elif block.language == "yaml":
            check_yaml(block)
        elif block.language == "bash":
            check_script(block.text, block.where)
        else:
            assert block.language in SHOWN_ONLY, f"{block.where}: unknown language '{block.language}'"


def compiled(block: Block) -> CodeType:
    """A Python block, with its lines numbered as in the page."""
    return compile("\n" * (block.line - 1) + block.text, str(block.file), "exec")


def check_yaml(block: Block) -> None:
    """A run's or a sweep's file, or some sections of one."""
    values = yaml.safe_load(block.text)
    for plugin in [*values.get("plugins", ()), *values.get("set", {}).get("plugins", ())]:
        Path(plugin).touch()  # the page's Python has registered what it would
    file = Path("block.yaml")
    whole = "base" in values or "model" in values
    file.write_text(block.text if whole else f"base: digits/base.yaml\n{block.text}")
    try:
        load_sweep(str(file), []) if "cells" in values else load_config(file)
    except ValueError as error:
        raise AssertionError(f"{block.where}: {error}") from error
