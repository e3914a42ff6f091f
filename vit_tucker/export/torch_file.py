"""torch.export's own files (.pt2): loaded by torch without any Python of the model, in C++ and by AOTInductor too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from vit_tucker.export.compare import ImageFunction, without_gradients

METADATA = "metadata.json"
"""Name of the extra file in the archive."""


def write_torch_export(program: torch.export.ExportedProgram, file: Path, metadata: Mapping[str, str]) -> None:
    """Writes a recorded program without stack traces, which have paths of this machine.

    Args:
        program: the recorded model; its stack traces are removed.
        file: new, or replaced.
        metadata: strings by name, written as an extra file in it.
    """
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    torch.export.save(program, file, extra_files={METADATA: json.dumps(dict(metadata), indent=1)})


def torch_export_runner(file: Path) -> ImageFunction:
    """Returns the program of a file, loaded anew, on the CPU."""
    return without_gradients(torch.export.load(file).module())
