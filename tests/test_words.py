"""One meaning per word: no two classes share a name, and docs/design.md explains words by names that are there."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import vit_tucker

PACKAGE = Path(vit_tucker.__file__).parent
GLOSSARY = PACKAGE.parent / "docs" / "design.md"
SHARED: dict[str, str] = {}
"""Classes that may share a name, each with the reason."""
COMMANDS = "cli"
"""A command's function has the name of the command, which is often that of the function it calls."""
VAGUE = {
    *(
        "announce",
        "harmless",
        "channels",
        "recording",
        "watch",
        "probe",
        "peers",
        "taps",
        "mixers",
        "pipeline",
        "board",
    ),
    *("turns", "heed", "ballot", "Way", "UNTOLD"),
}
"""Names that tell nothing to a stranger: none of them may come back in the rooms below."""
CLEARED = (
    "analysis",
    "attention",
    "checkpoint",
    "cli",
    "config",
    "conversion",
    "data",
    "explain",
    "export",
    "hosts",
    "inference",
    "linear",
    "patching",
    "report",
    "run",
    "show",
    "storage",
    "sweep",
    "tensor",
    "training",
    "validation",
)


def names_in(text: str) -> dict[str, type[ast.AST]]:
    """Names of a module's own classes, functions and constants."""
    found: dict[str, type[ast.AST]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = type(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: ast.Assign for target in targets if isinstance(target, ast.Name)}
    return found


MODULES = {file.relative_to(PACKAGE): names_in(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def shared_classes(modules: dict[Path, dict[str, type[ast.AST]]]) -> dict[str, list[str]]:
    """Names that classes of several modules have."""
    places = defaultdict(list)
    for file, names in modules.items():
        for name, kind in names.items():
            if kind is ast.ClassDef:
                places[name].append(file.as_posix())
    return {name: files for name, files in places.items() if len(files) > 1}


def glossary() -> list[list[str]]:
    """Rows of the glossary: word, meaning, names in the code."""
    text = GLOSSARY.read_text().partition("## Glossary\n")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ][1:]


def test_no_two_classes_share_a_name():
    assert shared_classes(MODULES).keys() == SHARED.keys()
    twice = {Path("a.py"): names_in("class Table: ..."), Path("b.py"): names_in("class Table: ...\ndef Place(): ...")}
    assert shared_classes(twice) == {"Table": ["a.py", "b.py"]}


@pytest.mark.parametrize("room", CLEARED)
def test_vague_names_stay_away(room):
    own = {file: {file.stem, *names} for file, names in MODULES.items() if file.parts[0] == room}
    assert own
    assert {file.as_posix(): VAGUE & names for file, names in own.items() if VAGUE & names} == {}


def test_the_glossary_has_each_word_once_and_names_what_is_there():
    words = [word for row in glossary() for word in row[0].split(", ")]
    assert len(words) > 30
    assert len(set(words)) == len(words)
    known = {name for names in MODULES.values() for name in names}
    known |= {part for file in MODULES for part in file.with_suffix("").parts}
    for word, meaning, code in glossary():
        assert meaning
        assert set(re.findall(r"`(.*?)`", code)) <= known, word
        assert code
