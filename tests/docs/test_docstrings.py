"""Docstrings in the package: arguments with meanings and shapes, errors by name, first lines that are sentences.

Ruff's D rules hold the form (pyproject.toml); here is what they can't see, such as arguments listed as ``a, b: ...``.
"""

import re
from pathlib import Path

import vit_tucker
from docs.hooks import ROOT
from tests.docs.signatures import (
    MANY,
    Definition,
    Package,
    first_line_problem,
    read_package,
    tensors,
    unnamed_errors,
    without_shape,
)

SHOWN = re.compile(r"^::: (?P<name>[\w.]+)\n(?:    options:(?P<options>(?:.*\n)(?: {6}.*\n)*))?", re.MULTILINE)
MEMBERS = re.compile(r"members: \[(?P<names>[^\]]*)\]")
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
PACKAGE = read_package(Path(vit_tucker.__file__).parent)
MODULES = {one.module for one in PACKAGE.every}
CROWDED = {
    "vit_tucker.run.trainer.name_what_trains",
    "vit_tucker.run.trainer.prepare",
    "vit_tucker.run.trainer.freeze_others",
}
"""Functions of files at the limit of 250 lines: their text names three arguments or more, without ``Args:``."""


def shown_on(pages: list[str]) -> dict[str, set[str] | None]:
    """Returns the names on the API pages, each with its members that are shown; None for all."""
    found: dict[str, set[str] | None] = {}
    for text in pages:
        for entry in SHOWN.finditer(text):
            members = MEMBERS.search(entry["options"] or "")
            found[entry["name"]] = None if members is None else {name.strip() for name in members["names"].split(",")}
    return found


ON_PAGES = shown_on([page.read_text() + "\n" for page in PAGES])


def is_shown(one: Definition) -> bool:
    """Whether an API page shows a definition: by its module, its class or itself."""
    first, _, rest = one.name.partition(".")
    if one.module in ON_PAGES and (ON_PAGES[one.module] is None or first in ON_PAGES[one.module]):
        return True
    for name, members in ON_PAGES.items():
        package, _, last = name.rpartition(".")
        if name in MODULES:
            continue
        if rest and package.endswith(f".{first}") and last == rest:  # vit_tucker.AttentionConfig.check
            return True
        if last == first and one.module.startswith(package) and (not rest or members is None or rest in members):
            return True
    return False


def functions(package: Package) -> list[Definition]:
    """The public functions and methods with arguments, commands left out."""
    return [one for one in package.every if one.is_public and one.arguments and not one.is_command]


def test_arguments_are_described():
    wanted = [one for one in functions(PACKAGE) if len(one.arguments) >= MANY or is_shown(one)]
    assert len(wanted) > 600
    missing = {one.place: names for one in wanted if (names := PACKAGE.missing(one))}
    assert missing.keys() == CROWDED
    by_name = {one.place: one for one in PACKAGE.every}
    assert [name for name in CROWDED for argument in missing[name] if f"``{argument}``" not in by_name[name].text] == []


def test_tensors_have_shapes():
    assert {one.place: names for one in functions(PACKAGE) if (names := without_shape(one))} == {}
    in_text = [one for one in functions(PACKAGE) if set(tensors(one)) & set(PACKAGE.missing(one))]
    assert [one.place for one in in_text if "(" not in one.text] == []


def test_errors_are_named():
    public = [one for one in PACKAGE.every if one.is_public and one.text and not one.is_command]
    assert {one.place: names for one in public if (names := unnamed_errors(one))} == {}


def test_first_lines_are_sentences():
    assert {one.place: problem for one in PACKAGE.every if (problem := first_line_problem(one))} == {}


def test_members_of_api_pages_are_found():
    assert {"vit_tucker.patch", "vit_tucker.tensor.tucker"} <= ON_PAGES.keys()
    assert ON_PAGES["vit_tucker.checkpoint.entry"] == {"patched_model", "create"}
    assert ON_PAGES["vit_tucker.tensor.tucker"] is None
    shown = {one.place for one in PACKAGE.every if is_shown(one)}
    assert {
        "vit_tucker.patching.patch.patch",
        "vit_tucker.attention.base.AttentionConfig.check",
        "vit_tucker.storage.run_dir.RunDir.start",
        "vit_tucker.tensor.tucker.hosvd",
    } <= shown
    assert not {"vit_tucker.checkpoint.entry.known_entries", "vit_tucker.training.engine.fit"} & shown


FAULTY = '''"""What is wrong here, for the test."""


def wide(x: Tensor, y: int, z: int) -> None:
    """Adds numbers to a tensor.

    Args:
        x: numbers.
        y: another one.
        w: nothing of that name.
    """
    raise ValueError(y)


def pair(x: Tensor, y: int) -> None:
    """Adds ``y`` to ``x`` (B, N), in place of both."""


def like(x: Tensor, y: int, z: int) -> None:
    """Adds all of them as well; arguments as of ``faulty.good``."""


def unlike(x: Tensor, a: int, b: int) -> None:
    """Adds all of them as well; arguments as of ``good``."""


def good(x: Tensor, y: int, z: int) -> None:
    """Adds two numbers to a tensor, and raises ValueError.

    Args:
        x: (B, N).
        y, z: the numbers.
    """
    raise ValueError(y)


class Base:
    """A base of classes, for the test."""

    def method(self, x: Tensor, y: int, z: int) -> None:
        """Adds two numbers to a tensor.

        Args:
            x, y, z: (B, N) and the numbers.
        """


class Derived(Base):
    """Short."""

    def method(self, x: Tensor, y: int, z: int) -> None:
        """Numbers that are added up."""
        raise TypeError(x)

    def other(self, x: int, y: int, z: int) -> None:
        """Adds two numbers to a tensor"""
'''


def test_faults_are_seen():
    package = Package.of({"faulty": FAULTY})

    def found(problem):
        by_name = ((one.place, problem(one)) for one in package.every)
        return {name: problem for name, problem in by_name if problem}

    assert found(package.missing) == {
        "faulty.wide": ["z", "w"],
        "faulty.unlike": ["a", "b"],
        "faulty.Derived.other": ["x", "y", "z"],
    }
    assert found(without_shape) == {"faulty.wide": ["x"]}
    assert found(unnamed_errors) == {"faulty.wide": ["ValueError"], "faulty.Derived.method": ["TypeError"]}
    assert found(first_line_problem) == {
        "faulty": "starts with 'What'",
        "faulty.Derived": "has fewer than 5 words",
        "faulty.Derived.method": "does not start with a verb, but with 'Numbers'",
        "faulty.Derived.other": "has no full stop",
    }
