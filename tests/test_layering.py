"""Imports go one way: no circle, neither between rooms nor between files; and each room imports only those below it."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vit_tucker

PACKAGE = Path(vit_tucker.__file__).parent
ALLOWED = {
    "errors": set(),
    "version": set(),
    "validation": {"errors"},
    "show": {"errors", "validation"},
    "storage": {"errors", "validation", "show"},
    "tensor": {"errors"},
    "attention": {"errors", "tensor", "validation", "show"},
    "config": {"errors", "attention", "linear", "storage", "validation"},
    "linear": {"errors", "tensor", "attention"},
    "hosts": {"errors", "validation", "tensor", "attention", "linear"},
    "conversion": {"errors", "tensor", "attention", "linear", "hosts", "show"},
    "patching": {"errors", "validation", "tensor", "attention", "hosts", "conversion", "show"},
    "checkpoint": {"errors", "version", "storage", "attention", "config", "hosts", "patching", "show"},
    "export": {"errors", "version", "attention", "hosts", "patching", "checkpoint"},
    "data": {"errors", "storage", "config", "hosts", "show"},
    "training": {"errors", "validation", "storage", "config", "data", "show"},
    "analysis": {
        "errors",
        "tensor",
        "attention",
        "config",
        "hosts",
        "conversion",
        "patching",
        "checkpoint",
        "training",
        "show",
    },
    "inference": {
        *("errors", "storage", "attention", "config", "hosts", "patching", "checkpoint", "export", "data", "training"),
        *("analysis", "run", "show"),
    },
    "report": {"errors", "storage", "show"},
    "explain": {
        *(
            "errors",
            "storage",
            "attention",
            "config",
            "hosts",
            "conversion",
            "patching",
            "checkpoint",
            "data",
            "inference",
            "show",
        ),
    },
    "run": {
        *(
            "errors",
            "version",
            "storage",
            "attention",
            "config",
            "hosts",
            "patching",
            "checkpoint",
            "data",
            "training",
            "analysis",
            "show",
        ),
    },
    "sweep": {
        *(
            "errors",
            "validation",
            "storage",
            "config",
            "hosts",
            "patching",
            "data",
            "training",
            "analysis",
            "report",
            "run",
            "show",
        ),
    },
    "cli": {
        *("errors", "version", "storage", "attention", "config", "hosts", "patching", "checkpoint", "export", "data"),
        *("training", "analysis", "inference", "show", "report", "explain", "run", "sweep"),
    },
    "__main__": {"cli", "config"},
    "__init__": {
        *(
            "errors",
            "version",
            "attention",
            "linear",
            "patching",
            "checkpoint",
            "explain",
            "export",
            "show",
            "training",
        ),
    },
}
"""What each room may import, from the bottom up."""
PARTS = {
    "tracing": "common",
    "gradients": "common",
    "rope": "common",
    "options": "common",
    "host": "common",
    "effective": "weights",
    "parametrized": "weights",
    "linear": "weights",
    "contraction": "common",
    "cores": "common",
    "triton_tucker": "kernels",
    "backends": "backends",
    "attend": "backends",
    "decoding": "backends",
    "call": "layers",
    "moments": "layers",
    "host_maps": "layers",
    "moment_sums": "layers",
    "rotation_sums": "layers",
    "convertible": "layers",
    "module": "layers",
    "heads": "layers",
    "latent_layer": "layers",
    "latent_rope": "layers",
    "base": "methods",
    "registry": "methods",
    "variants": "methods",
    "special_cases": "forms",
}
"""The part of ``attention`` that each of its files and folders belongs to."""
ALLOWED_IN_ATTENTION = {
    "common": set(),
    "weights": {"common"},
    "kernels": {"common"},
    "backends": {"common", "kernels"},
    "layers": {"common", "weights", "backends"},
    "methods": {"common", "weights", "backends", "layers"},
    "forms": {"common", "weights", "backends", "layers", "methods"},
}
FILES = sorted(file for file in PACKAGE.rglob("*.py") if not file.is_relative_to(PACKAGE / "configs"))


def module_of(file: Path) -> str:
    """'vit_tucker/data/sampler.py' -> 'data.sampler'; a folder's __init__ is the folder."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(file): file for file in FILES}


def imports_of(text: str, modules: set[str] | dict[str, Path] = MODULES) -> set[str]:
    """Modules of vit_tucker, by their names below it, that a source imports anywhere; '__init__' for the package itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head != "vit_tucker":
                continue
            found.add(next((n for n in (rest, rest.rpartition(".")[0]) if n in modules), "__init__"))
    return found


@cache
def all_imports() -> dict[str, set[str]]:
    """What each module imports."""
    return {module: imports_of(file.read_text()) for module, file in MODULES.items()}


def refuse_circles(graph: dict[str, set[str]]) -> None:
    """Raises AssertionError with the circle, if there is one."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    room = module.partition(".")[0]
    assert {name.partition(".")[0] for name in all_imports()[module]} - {room} <= ALLOWED[room]


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("attention.")))
def test_parts_of_attention_import_one_way(module):
    part = PARTS[module.split(".")[1]]
    found = {PARTS[name.split(".")[1]] for name in all_imports()[module] if name.startswith("attention.")}
    assert found - {part} <= ALLOWED_IN_ATTENTION[part]


def test_there_is_no_circle():
    for graph in (ALLOWED, ALLOWED_IN_ATTENTION, {m: n - {m, "__init__"} for m, n in all_imports().items()}):
        refuse_circles(graph)


def test_every_room_and_part_exists():
    assert {module.partition(".")[0] for module in MODULES} == set(ALLOWED)
    assert {module.split(".")[1] for module in MODULES if module.startswith("attention.")} == set(PARTS)


def test_the_root_keeps_four_files():
    assert {file.name for file in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "version.py"}


def test_wrong_arrows_and_circles_are_seen():
    text = "from vit_tucker.training.engine import fit\nimport vit_tucker.patching.patch\nfrom vit_tucker import plan\n"
    assert imports_of(text) == {"training.engine", "patching.patch", "__init__"}
    assert imports_of("def f():\n    from vit_tucker.hosts import find\n") == {"hosts.find"}
    with pytest.raises(AssertionError, match="a -> b -> a|b -> a -> b"):
        refuse_circles({"a": {"b"}, "b": {"a"}})


def test_only_hosts_knows_timms_attention_classes():
    words = ("vision_transformer", "timm.layers")
    users = {module for module, file in MODULES.items() if any(word in file.read_text() for word in words)}
    assert users <= {"hosts.timm_classes"}
