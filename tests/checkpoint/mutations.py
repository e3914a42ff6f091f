"""Folders of saved models and runs, damaged in one place: by chance, by an editor, by another program, on purpose."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Pick = Callable[[Sequence[Any]], Any]
"""Chooses one of several things: a hypothesis draw, or a random choice."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**70, -(2**40), 0.5, -0.5, 1.0, 1e308, float("nan"), float("inf")),
    *("", "x", "3", "a\nb", "\x00", "\ud800", "../..", "hf-hub:a/b", "x" * 5000),
    *([], {}, [0], [None], ["x"], [[]], [1, 2, 3], {"a": 1}, {"method": "tucker"}, [0.5] * 3, [10**6] * 3),
)
"""What may stand in the place of a JSON value."""
TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "half": lambda b: b[: len(b) // 2],
    "without its end": lambda b: b[:-3],
    "twice": lambda b: b + b,
    "BOM": lambda b: b"\xef\xbb\xbf" + b,
    "UTF-16": lambda b: b.decode("utf-8", "replace").encode("utf-16"),
    "not UTF-8": lambda b: b[:40] + b"\xff\xfe" + b[40:],
    "NUL": lambda b: b + b"\x00",
    "deep lists": lambda b: b"[" * 100_000,
    "deep objects": lambda b: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "long number": lambda b: b'{"architecture": ' + b"9" * 10_000 + b"}",
    "a key twice": lambda b: b"{" + b.strip()[1:-1] + b"," + b.strip()[1:-1] + b"}",
    "a list": lambda b: b"[1, 2]",
    "null": lambda b: b"null",
    "an object": lambda b: b"{}",
    "a pickle": lambda b: b"\x80\x04\x95",
}
"""What may become of a text file."""


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the places inside JSON values, as keys and indices one after another."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in items for place in ((*path, key), *paths_in(part, (*path, key)))]


def edit_json(values: Any, pick: Pick, within: tuple[str, ...] = ()) -> tuple[Any, str]:
    """Returns JSON values with one place changed, and what was done."""
    values = copy.deepcopy(values)
    root = values
    for key in within:
        root = root[key]
    groups: dict[Any, list[tuple[Any, ...]]] = {}
    for path in paths_in(root):
        groups.setdefault(path[:2], []).append(path)
    *above, last = pick(groups[pick(list(groups))])
    entry = root
    for key in above:
        entry = entry[key]
    old = entry[last]
    kinds = ["value", "value", "value", "delete", "nest", "text"]
    kinds += ["rename", "add"] if isinstance(entry, dict) else ["swap"]
    kinds += ["number"] * 2 if isinstance(old, int | float) and not isinstance(old, bool) else []
    kind = pick(kinds)
    if kind == "value":
        entry[last] = pick(VALUES)
    elif kind == "delete":
        del entry[last]
    elif kind == "nest":
        entry[last] = pick([[old], {"a": old}, {str(last): old}])
    elif kind == "text":
        entry[last] = str(old)
    elif kind == "rename":
        entry[pick([f"{last}x", str(last)[:-1], str(last).upper(), "method", "checkpoint"])] = entry.pop(last)
    elif kind == "add":
        entry[pick(["new", "eps", "depth", "img_size", "qk_norm"])] = pick(VALUES)
    elif kind == "swap":
        entry.reverse()
    else:
        entry[last] = pick([old + 1, old - 1, -old, old * 2, old * 1000, float(old)])
    return values, f"{kind} at {'.'.join(map(str, (*within, *above, last)))}"


def rewrite_json(file: Path, pick: Pick, within: tuple[str, ...] = ()) -> str:
    """Changes one place of a JSON file, and says what was done."""
    values, what = edit_json(json.loads(file.read_text()), pick, within)
    file.write_text(json.dumps(values))
    return f"{file.name}: {what}"


def rewrite_text(file: Path, pick: Pick) -> str:
    """Damages a text file as such, and says how."""
    what = pick(list(TEXTS))
    file.write_bytes(TEXTS[what](file.read_bytes()))
    return f"{file.name}: {what}"


def replace_file(file: Path, pick: Pick) -> str:
    """Puts something else in the place of a file."""
    what = pick(["gone", "folder", "dangling link", "loop", "another file", "pipe"])
    others = sorted(f for f in file.parent.iterdir() if f.is_file() and f != file)
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "dangling link":
        file.symlink_to("nowhere")
    elif what == "loop":
        file.symlink_to(file.name)
    elif what == "another file":
        shutil.copy(pick(others), file)
    elif what == "pipe":
        os.mkfifo(file)
    return f"{file.name}: {what}"


def rewrite_bytes(file: Path, pick: Pick) -> str:
    """Flips a bit, or changes the length of a binary file."""
    content = bytearray(file.read_bytes())
    what = pick(["flip", "flip", "flip", "cut", "empty", "more", "header length"])
    place = pick([0, 7, 9, 60, 200, 1000, len(content) // 2, len(content) - 5, len(content) - 1]) % max(len(content), 1)
    if what == "flip":
        content[place] ^= 1 << pick(range(8))
    elif what == "cut":
        del content[place:]
    elif what == "empty":
        content.clear()
    elif what == "more":
        content += b"\0" * 9
    else:
        content[:8] = pick([0, 2, 1 << 20, 1 << 62]).to_bytes(8, "little")
    file.write_bytes(content)
    return f"{file.name}: {what} at {place}"


def rewrite_header(file: Path, pick: Pick) -> str:
    """Changes one place of the header of a safetensors file, which stays as long as it says it is."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    values, what = edit_json(json.loads(content[8 : 8 + length]), pick)
    header = json.dumps(values).encode("utf-8", "replace")
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return f"{file.name}: header: {what}"


def rewrite_tensors(file: Path, pick: Pick) -> str:
    """Changes the tensors of a safetensors file, which stays a valid one."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    name, what = (
        pick(list(state)),
        pick(["nan", "dtype", "transpose", "drop", "add", "rename", "index", "shape", "scale"]),
    )
    if what == "index":
        whole = [key for key, value in state.items() if not value.is_floating_point()]
        name = pick(whole) if whole else name
    value = state[name]
    if what == "nan":
        state[name] = torch.full_like(value, float("nan")) if value.is_floating_point() else value - 1
    elif what == "dtype":
        kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64]
        state[name] = value.to(pick(kinds))
    elif what == "transpose":
        state[name] = value.mT.contiguous() if value.ndim > 1 else value.flip(0)
    elif what == "drop":
        del state[name]
    elif what == "add":
        state[pick(["more", "blocks.0.attn.more", f"{name}x", "head.more"])] = value.clone()
    elif what == "rename":
        state[f"{name}x"] = state.pop(name)
    elif what == "index":
        state[name] = value + pick([1, -1, 10**6, 2**20])
    elif what == "shape":
        state[name] = pick([value[None], value.flatten()[:-1], value.flatten(), value.new_zeros(0), value.sum()])
    else:
        state[name] = value * 3
    save_file({key: part.contiguous().clone() for key, part in state.items()}, file, metadata=metadata)
    return f"{file.name}: {what} of {name}"


def damage_model(folder: Path, pick: Pick) -> str:
    """Changes one thing about a folder of a saved model, and says what."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    section = (("model_args",), ("model_args",), ("pretrained_cfg",), ("vit_tucker",), ())
    kind = pick(["json", "json", "json", "json", "text", "file", "bytes", "header", "tensors", "tensors"])
    if kind == "json":
        present = json.loads(config.read_text())
        return rewrite_json(config, pick, pick([path for path in section if not path or present.get(path[0])]))
    if kind == "text":
        return rewrite_text(config, pick)
    if kind == "file":
        return replace_file(pick([config, weights]), pick)
    return {"bytes": rewrite_bytes, "header": rewrite_header, "tensors": rewrite_tensors}[kind](weights, pick)
