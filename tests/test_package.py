"""The package's front: public names, each on demand."""

import ast
import configparser
import importlib
import sys
from pathlib import Path

import pytest

import vit_tucker
from vit_tucker.config.find import package_configs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

PARTS = {"attention", "explain", "export"}


def stated() -> dict[str, str]:
    """Public names by the module that the stub imports them from, for type checkers as for lazy_loader."""
    tree = ast.parse(Path(vit_tucker.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(
        alias.asname == alias.name for node in imports for alias in node.names
    )  # else no type checker exports it
    return {alias.name: f"vit_tucker.{node.module}" for node in imports for alias in node.names if node.module}


def test_every_public_name_is_there_and_where_type_checkers_think_it_is():
    assert {*stated(), *PARTS} == set(vit_tucker.__all__)
    for name, module in stated().items():
        assert getattr(vit_tucker, name) is getattr(importlib.import_module(module), name)
    for name in PARTS:
        assert getattr(vit_tucker, name) is sys.modules[f"vit_tucker.{name}"]
    assert set(vit_tucker.__all__) <= set(dir(vit_tucker))
    with pytest.raises(AttributeError, match="ptach"):
        vit_tucker.ptach  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'ptach'"):
        from vit_tucker import ptach  # type: ignore[attr-defined]  # noqa: F401


def test_all_configs_are_package_data():
    """A wheel has them: setup.cfg names the endings."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = [pattern.strip() for pattern in setup["options.package_data"]["*"].split(",")]
    files = [file for file in package_configs().rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert len(files) > 30
    assert [file for file in files if file.suffix != ".py" and not any(map(file.match, patterns))] == []
    assert "__init__.pyi" in setup["options.package_data"]["vit_tucker"]
    assert package_configs().parent == Path(vit_tucker.__file__).parent
