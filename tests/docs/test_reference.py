"""The Python reference has every public name, and docstrings say what the code does."""

import importlib
import inspect
import re
from typing import NamedTuple

import pytest
from torch import Tensor

import vit_tucker
import vit_tucker.explain
import vit_tucker.export
from docs.hooks import ROOT
from tests.docs.docstrings import problems, sections

SHOWN = re.compile(r"^::: (?P<name>[\w.]+)$", re.MULTILINE)
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
PUBLIC = [
    f"{package.__name__}.{name}"
    for package in (vit_tucker, vit_tucker.explain, vit_tucker.export)
    for name in package.__all__
    if not name.startswith("__") and not inspect.ismodule(getattr(package, name))
]
NAMES = [name for page in PAGES for name in SHOWN.findall(page.read_text())]


def resolve(name: str):
    """The module, class or function of that dotted name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(resolve(module), last)


def test_every_public_name_is_on_a_page():
    assert set(PUBLIC) - set(NAMES) == set()


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_of_public_names_are_complete(name):
    assert list(problems(name, resolve(name))) == []


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_what_is_shown_has_docstrings(name):
    thing = resolve(name)
    members = vars(thing).items() if inspect.ismodule(thing) else [(name.rpartition(".")[2], thing)]
    own = [
        (member, value)
        for member, value in members
        if not member.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        and (not inspect.ismodule(thing) or value.__module__ == name)
    ]  # fmt: skip
    assert [member for member, value in own if not value.__doc__] == []
    classes = ((member, value) for member, value in own if inspect.isclass(value))
    assert [problem for member, value in classes for problem in problems(f"{name}.{member}", value)] == []


def wrong(x: Tensor, y: int) -> None:
    """Something.

    Args:
        x: tokens.
        z: nothing of that name.
    """
    raise ValueError(y)


class Wrong(NamedTuple):
    """Something.

    Attributes:
        a, b: (H, C) both.
    """

    a: Tensor
    b: Tensor
    c: Tensor

    def method(self) -> int:
        return 1


def test_incomplete_docstrings_are_seen():
    assert set(problems("wrong", wrong)) == {
        "wrong: argument x is a tensor without a shape",
        "wrong: argument y is not documented",
        "wrong: there is no argument z",
        "wrong: raises ValueError without saying so",
    }
    assert set(problems("Wrong", Wrong)) == {
        "Wrong: attribute c is not documented",
        "Wrong.method: no docstring",
    }
    assert list(problems("resolve", lambda: None)) == ["resolve: no docstring"]


def test_sections_are_read_over_lines():
    text = "A.\n\nArgs:\n    a, b: one\n        two.\n    *c: three\n\nSource: x: y"
    assert sections(text) == {"Args": {"a": "one two.", "b": "one two.", "c": "three"}}
