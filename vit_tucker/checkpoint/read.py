"""Tensors of weights files of many kinds, by name; nothing in them is executed."""

import argparse
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vit_tucker.checkpoint.files import INDEX, shards_of
from vit_tucker.errors import CheckpointError, one_line

ENTRIES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model", "teacher", "target_encoder", "encoder"),
    *("net", "network", "module", "params", "weights", "student"),
)
"""Entries of a training checkpoint that hold the weights, the preferred ones first: averaged weights before the trained ones, as
in timm; DINO's teacher before its student."""
FOREIGN = {
    ".onnx": "an ONNX file",
    ".h5": "a Keras file",
    ".keras": "a Keras file",
    ".msgpack": "a Flax file",
    ".gguf": "a GGUF file",
    ".npy": "a single NumPy array",
    ".json": "a JSON file",
    ".index": "a TensorFlow file",
}
MAX_DEPTH = 4
"""Mappings within mappings in which weights are looked for."""
UNSAFE = re.compile(r"Unsupported global: GLOBAL (\S+)|Unsupported globals: ([^ ,]+(?:, [^ ,]+)*?)\. ")
"""Classes that torch and timm refuse to unpickle, in their messages."""
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
ADVICE = (
    *("No automatic unsafe", "If this checkpoint is trusted", "Please file an issue", "This is an internal"),
    *("In PyTorch 2.6", "Check the documentation"),
)
"""Where messages of torch and timm go on with what doesn't help here."""


@contextmanager
def weights_only() -> Iterator[None]:
    """Makes torch.load read tensors and plain values and execute nothing, whatever its caller asks for.

    Some ways of loading unpickle anything unless asked otherwise, in timm before it made safe loading its default. Plain values
    that training scripts save beside their weights are let through: their arguments (argparse), paths, and NumPy's numbers.
    """
    force, force_not = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, force_not)}
    os.environ[force] = "1"
    try:
        with torch.serialization.safe_globals(plain_classes()):
            yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def plain_classes() -> list[Any]:
    """Returns classes whose pickles are values and not code, beyond those that torch itself accepts."""
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    scalars = [numpy_scalar(module) for module in ("numpy.core.multiarray", "numpy._core.multiarray")]
    return [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.dtype, *kinds, *scalars]


def numpy_scalar(module: str) -> Callable[..., Any]:
    """Returns NumPy's function that rebuilds a number, under the name that it has in pickles of one version of NumPy."""

    def scalar(*args: Any) -> Any:
        return np.float64(0).__reduce__()[0](*args)

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


def read_state(file: Path, what: str) -> tuple[dict[str, Tensor], str]:
    """Reads the tensors of a weights file.

    Args:
        file: safetensors, an index of shards, or what torch.save wrote.
        what: names the file, for messages.

    Returns:
        Tensors by name, on the CPU, and the entry of the file that holds them, '' for the file itself.

    Raises:
        CheckpointError: the file is empty, of another kind, holds objects besides plain values, or holds no tensors.
    """
    if file.name.endswith(INDEX):
        state: dict[str, Tensor] = {}
        for shard in shards_of(file, what):
            state |= read_state(shard, what)[0]
        return state, ""
    refuse_foreign(file, what)
    values = read_values(file, what)
    state, entry = find_tensors(values)
    if not state:
        raise CheckpointError(f"{what}: {file} contains no tensors: {contents(values)}")
    return state, entry


def refuse_foreign(file: Path, what: str) -> None:
    """Raises CheckpointError for a file that is no weights file at all, with what it is."""
    with file.open("rb") as opened:
        start = opened.read(256)
    kind = FOREIGN.get(file.suffix.lower())
    if not start:
        kind = "empty (0 bytes)"
    elif start.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer and not the weights themselves: fetch them by git lfs pull"
    elif WEB_PAGE.match(start):
        kind = "a web page and not weights: it was downloaded from a wrong address"
    elif start.startswith(b"PK") and zipfile.is_zipfile(file):
        names = zipfile.ZipFile(file).namelist()
        if any(name.endswith("constants.pkl") for name in names):
            kind = "a TorchScript program; save the state dict of its model instead"
        elif not any(name.endswith("data.pkl") for name in names):
            kind = f"a ZIP archive without weights ({', '.join(names[:3])})"
    if kind is not None:
        helped = "weights" in kind or "instead" in kind
        hint = "" if helped else "; supported are safetensors, files of torch.save and .npz"
        raise CheckpointError(f"{what}: {file} is {kind}{hint}")


def read_values(file: Path, what: str) -> Any:
    """Reads the contents of a file, without executing anything; raises CheckpointError if it can't be read."""
    try:
        if file.suffix == ".safetensors":
            return load_file(str(file))
        with weights_only():
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what}: {file} can't be read as weights: {short_reason(error)}") from None
    except Exception as error:  # torch and pickle raise many kinds for a damaged file
        raise CheckpointError(f"{what}: {file} can't be read as weights: {unreadable(error, file)}") from None


def unreadable(error: Exception, file: Path) -> str:
    """Returns why torch could not read a file: the classes of objects in it that are no plain values, or the error itself."""
    try:
        with weights_only():
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not even a pickle
        unsafe = []
    return unsafe_objects(unsafe) if unsafe else short_reason(error)


def unsafe_objects(names: Iterable[str]) -> str:
    """Returns why a file with objects of these classes is not read, and what helps."""
    return (
        f"it contains Python objects besides tensors ({', '.join(sorted(names)[:4])}), and nothing is executed here; save the "
        "weights alone where you trust the file: torch.save(model.state_dict(), ...)"
    )


def short_reason(error: Exception) -> str:
    """Returns the text of an error in one line, without advice to load unsafely; its class if it has none."""
    text = one_line(error)
    if (found := UNSAFE.search(text)) is not None:
        return unsafe_objects((found[1] or found[2]).split(", "))
    text = text.partition("WeightsUnpickler error: ")[2] or text
    for advice in ADVICE:
        text = text.partition(advice)[0].strip()
    return text[:200] or type(error).__name__


def find_tensors(values: Any) -> tuple[dict[str, Tensor], str]:
    """Finds the weights in the contents of a file: a state dict, or a mapping with entries that are one, see ``ENTRIES``.

    Returns:
        Tensors by name, empty if there are none; and the entry, 'state_dict' or 'model.teacher'.
    """
    entries: list[str] = []
    for _ in range(MAX_DEPTH):
        if not isinstance(values, Mapping):
            return {}, ".".join(entries)
        tensors = {str(key): value for key, value in values.items() if isinstance(value, Tensor)}
        inner = next((name for name in ENTRIES if isinstance(values.get(name), Mapping) and values[name]), None)
        if tensors or inner is None:
            return tensors, ".".join(entries)
        entries.append(inner)
        values = values[inner]
    return {}, ".".join(entries)


def contents(values: Any) -> str:
    """Describes in a few words what a file contains in place of weights."""
    if isinstance(values, Tensor):
        return f"it is one tensor {tuple(values.shape)}"
    if not isinstance(values, Mapping):
        return f"it is a {type(values).__name__}"
    if not values:
        return "it is an empty mapping"
    parts = []
    for key, value in list(values.items())[:6]:
        size = f" of {len(value)} entries" if isinstance(value, Mapping) else ""
        parts.append(f"{key} (a {type(value).__name__}{size})")
    return f"it contains {', '.join(parts)}"
