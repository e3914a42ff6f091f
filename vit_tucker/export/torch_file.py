"""torch.export's own files (.pt2): loaded by torch without any Python of the model, in C++ and by AOTInductor too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vit_tucker.export.compare import ImageFunction

METADATA = "metadata.json"
"""Name of the extra file in the archive."""


def write_torch_export(program: torch.export.ExportedProgram, file: Path, metadata: Mapping[str, str]) -> None:
    """Save a recorded program; its metadata is the extra file ``metadata.json``. Stack traces, with paths of this machine, are
    left out."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    torch.export.save(program, file, extra_files={METADATA: json.dumps(dict(metadata), indent=1)})


def torch_export_runner(file: Path) -> ImageFunction:
    """The file, loaded anew, on the CPU."""
    module = torch.export.load(file).module()

    def run(image: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(image)
        return logits

    return run
