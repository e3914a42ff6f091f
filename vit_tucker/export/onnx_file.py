"""ONNX files: written by torch's exporter from a recorded program, trimmed, and run by onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_tucker.errors import ExportError, how_to_install
from vit_tucker.export.capture import first_line
from vit_tucker.export.compare import ImageFunction

INPUT, OUTPUT = "image", "logits"
EXTERNAL_BYTES = 2 * 10**9
"""Weights of more bytes lie in a file of their own: a protobuf message holds 2 GiB at most."""
OLDEST_OPSET = 18
"""Of torch's exporter; for an older one it would write this one and say nothing."""
NEEDS = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Raises ExportError where a package that ONNX needs is missing."""
    from importlib.util import find_spec

    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: {how_to_install('onnx')}")


def write_onnx(
    program: torch.export.ExportedProgram, file: Path, metadata: Mapping[str, str], opset: int | None = None
) -> None:
    """Translates a recorded program and writes it, with all weights inside up to 2 GB.

    Args:
        program: see ``capture``.
        file: to write; weights beyond 2 GB go to ``file`` + ".data".
        metadata: goes into ``metadata_props``.
        opset: version of the operator set; the exporter's own if None.

    Raises:
        ExportError: torch's exporter has no translation.
    """
    import onnx

    external = weight_bytes(program) > EXTERNAL_BYTES
    try:
        with quiet():
            translated = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], opset_version=opset, optimize=True,
                verbose=False,
            )  # fmt: skip
            translated.save(file, external_data=external)  # type: ignore[union-attr]
    except Exception as error:
        raise ExportError(f"torch.onnx can't translate this model: {first_line(error)}") from None
    proto = onnx.load(str(file), load_external_data=False)
    written = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in (None, written):  # the exporter takes the nearest that it can, without a word
        raise ExportError(
            f"torch.onnx of torch {torch.__version__} writes no opset {opset} for this model, but {written}"
        )
    trim(proto)
    name_dimensions(proto)
    onnx.helper.set_model_props(proto, dict(metadata))
    file.write_bytes(proto.SerializeToString())


def weight_bytes(program: torch.export.ExportedProgram) -> int:
    """Returns the bytes of all parameters, buffers and constants."""
    tensors = (*program.state_dict.values(), *(c for c in program.constants.values() if isinstance(c, Tensor)))
    return sum(t.numel() * t.element_size() for t in tensors)


def external_file(file: Path) -> Path:
    """Returns where the weights of a model beyond 2 GB lie."""
    return file.with_name(file.name + ".data")


def trim(proto: Any) -> None:
    """Removes what the exporter notes for its own debugging: stack traces with paths of this machine, symbols, inner shapes."""
    graph = proto.graph
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")


def name_dimensions(proto: Any) -> None:
    """Names the open dimensions batch, height and width."""
    names: dict[str, str] = {}
    shape = proto.graph.input[0].type.tensor_type.shape
    for dimension, name in zip(shape.dim, ("batch", "channels", "height", "width"), strict=True):
        if dimension.HasField("dim_param"):
            names[dimension.dim_param] = name
            dimension.dim_param = name
    for dimension in (dimension for output in proto.graph.output for dimension in output.type.tensor_type.shape.dim):
        if dimension.HasField("dim_param"):
            dimension.dim_param = names.get(dimension.dim_param, dimension.dim_param)


def onnx_runner(file: Path, threads: int | None = None) -> ImageFunction:
    """Returns an ONNX file of ours as a function of images, in onnxruntime on the CPU; see ``onnx_session``."""
    session = onnx_session(file, threads)

    def run(image: Tensor) -> Tensor:
        (logits,) = session.run(None, {INPUT: image.numpy()})
        return torch.from_numpy(logits)

    return run


def onnx_session(model: Path | bytes, threads: int | None = None) -> Any:
    """Makes a session of onnxruntime's CPU provider, of a file or of what is in one.

    Args:
        model: a file, or its content.
        threads: of the session; torch's number if None.

    Raises:
        ExportError: onnxruntime can't load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # threads that wait must not spin: other sessions and torch use the cores too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # its errors are raised as well, its warnings are about its own optimisations
    try:
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ExportError(f"onnxruntime can't load the file: {first_line(error)}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the exporter's remarks on its own work within the context."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
