"""Imports go one way: tensor <- attention <- config, patching <- data <- training; report reads files; run and cli on top."""

import ast
from pathlib import Path

import pytest

import vit_tucker

PACKAGE = Path(vit_tucker.__file__).parent
MODULES = sorted(file for file in PACKAGE.rglob("*.py") if not file.is_relative_to(PACKAGE / "configs"))
ALLOWED = {
    "errors": set(),
    "paths": {"errors"},
    "live_bytes": set(),
    "version": set(),
    "channels": set(),
    "registration": {"checkpoint"},
    "weights": {"errors"},
    "json_files": {"errors", "validation"},
    "digests": {"errors", "json_files", "weights"},
    "run_files": {"json_files", "validation"},
    "validation": {"errors"},
    "tensor": {"errors"},
    "attention": {"errors", "tensor", "validation"},
    "config": {"errors", "attention", "paths", "validation"},
    "patching": {"errors", "tensor", "attention", "validation"},
    "export": {"channels", "errors", "attention", "patching", "checkpoint", "version"},
    "data": {"channels", "errors", "config"},
    "training": {
        *("errors", "config", "data", "digests", "json_files", "live_bytes", "run_files", "validation", "weights"),
    },
    "analysis": {"errors", "tensor", "attention", "patching", "live_bytes"},
    "checkpoint": {
        *("channels", "digests", "errors", "json_files", "run_files", "version", "weights", "attention", "patching"),
    },
    "models": {"digests", "errors", "config", "patching", "checkpoint", "weights"},
    "harmless": set(),
    "report": {"errors", "harmless", "json_files", "paths", "run_files"},
    "build": {"errors", "attention", "config", "patching", "checkpoint", "data", "training", "models"},
    "trainer_setup": {
        *("errors", "attention", "config", "data", "patching", "training", "analysis", "build"),
        *("checkpoint", "digests", "weights"),
    },
    "announce": {"config", "data", "models", "training", "analysis", "build", "weights"},
    "run_folder": {
        *("errors", "config", "data", "training", "build", "trainer_setup", "paths", "harmless", "weights"),
    },
    "run": {
        "digests",
        "errors",
        "config",
        "data",
        "training",
        "build",
        "trainer_setup",
        "announce",
        "run_folder",
        "weights",
    },
    "costs": {"errors", "attention", "config", "patching", "training", "models", "analysis"},
    "inference": {"errors", "config", "data", "checkpoint", "patching"},
    "explain": {
        "channels",
        "errors",
        "attention",
        "patching",
        "checkpoint",
        "config",
        "data",
        "models",
        "report",
        "inference",
    },
    "cli": {
        *(
            "errors",
            "version",
            "attention",
            "config",
            "patching",
            "checkpoint",
            "data",
            "training",
            "models",
            "analysis",
        ),
        *("report", "run", "build", "paths", "costs", "trainer_setup", "inference", "explain", "sweep", "export"),
    },
    "sweep": {
        *("errors", "validation", "config", "data", "patching", "training", "analysis", "report"),
        *("build", "costs", "paths", "run_folder", "cli"),
    },
    "__main__": {"cli", "config"},
    "__init__": {"registration"},
}


def imported_parts(file: Path) -> set[str]:
    """First-level parts of vit_tucker that a file imports ('' for the package itself)."""
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" if node.module == "vit_tucker" else node.module for a in node.names]
        known = set(ALLOWED)
        for name in names:
            head, _, rest = name.partition(".")
            if head == "vit_tucker":
                part = rest.partition(".")[0]
                parts.add(part if part in known else "")
    return parts


def part_of(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    part = part_of(file)
    assert imported_parts(file) - {part} <= ALLOWED[part]


def test_wrong_arrows_are_seen(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(
        "from vit_tucker.training.engine import fit\nimport vit_tucker.patching.patch\nfrom vit_tucker import plan\n"
    )
    assert imported_parts(file) == {"training", "patching", ""}


def test_only_hosts_knows_timms_attention_classes():
    users = [f.name for f in MODULES if "vision_transformer" in f.read_text() or "timm.layers" in f.read_text()]
    allowed = {"hosts.py"}
    assert set(users) <= allowed
