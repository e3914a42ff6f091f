"""The package's front: public names on demand, and timm's registry in either order of imports."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import vit_tucker
from tests.conftest import process_environment
from vit_tucker.config.find import package_configs

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys
import vit_tucker
assert "torch" not in sys.modules and "timm" not in sys.modules, "importing the package imports torch"
from vit_tucker.cli import build_parser
build_parser().format_help()
assert "torch" not in sys.modules, "--help imports torch"
import timm
assert timm.is_model("vit_tucker_patched"), "timm was imported last, and does not know patched models"
assert "vit_tucker.checkpoint" not in sys.modules
vit_tucker.patch
"""


def imported_for_type_checkers() -> dict[str, str]:
    """Public names by the module that the TYPE_CHECKING block imports them from."""
    tree = ast.parse(Path(vit_tucker.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names if node.module != "vit_tucker"}


def test_every_public_name_is_there_and_where_type_checkers_think_it_is():
    assert imported_for_type_checkers() == vit_tucker._MODULE_OF
    assert set(vit_tucker.__all__) == {*vit_tucker._MODULE_OF, "__version__"}
    for name, module in vit_tucker._MODULE_OF.items():
        assert getattr(vit_tucker, name) is getattr(sys.modules[module], name)
    assert {*vit_tucker.__all__, "explain", "export"} <= set(dir(vit_tucker))
    assert vit_tucker.export.export_model
    with pytest.raises(AttributeError, match="no attribute 'ptach'"):
        vit_tucker.ptach  # noqa: B018


def test_all_configs_are_package_data():
    """A wheel has them: setup.cfg names the endings."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = [pattern.strip() for pattern in setup["options.package_data"]["*"].split(",")]
    files = [file for file in package_configs().rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert len(files) > 30
    assert [file for file in files if file.suffix != ".py" and not any(map(file.match, patterns))] == []
    assert package_configs().parent == Path(vit_tucker.__file__).parent


def test_nothing_heavy_is_imported_before_it_is_needed_and_timm_may_come_last():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
