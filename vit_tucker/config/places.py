"""Files that a config names, wherever a command runs: a run remembers where it was started and where it lay.

The paths in a run's config.yaml stay as they were written, so that the file can be used elsewhere; ``started.json`` beside it
says from which folder they are seen. A run that was moved together with what it names finds it at the new place.
"""

import json
import os
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from vit_tucker.config.model_section import LANGUAGE_MODEL

STARTED_FILE = "started.json"
LOCAL = ("local-dir:", LANGUAGE_MODEL)
"""What names of models in a folder begin with."""
PATHS = (
    *("model.checkpoint", "model.name", "data.root", "data.class_map", "data.labels", "data.dataset_kwargs.class_map"),
    *("train.distill.teacher", "plugins"),
)
"""Keys that may name files; of a list or mapping, each entry."""


def map_paths(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Returns a config's values with another text in place of each path.

    Args:
        values: nested, as in a YAML file; what is no path, or of a wrong type, stays.
        change: from a path to a path.
    """

    def changed(value: Any, key: str) -> Any:
        if not isinstance(value, str):
            return value
        if key == "model.name":
            prefix = next((prefix for prefix in LOCAL if value.startswith(prefix)), None)
            return value if prefix is None else prefix + change(value.removeprefix(prefix))
        no_file = (key == "plugins" and not value.endswith(".py")) or (
            key == "train.distill.teacher" and value == "host"
        )
        return value if no_file else change(value)

    def inside(value: Any, key: str) -> Any:
        below = [path for path in PATHS if path == key or path.startswith(f"{key}.")]
        if key in PATHS and isinstance(value, list):
            return [changed(entry, key) for entry in value]
        if key == "data.labels" and isinstance(value, dict):
            return {name: changed(entry, key) for name, entry in value.items()}
        if key in PATHS:
            return changed(value, key)
        if below and isinstance(value, dict):
            return {name: inside(entry, f"{key}.{name}") for name, entry in value.items()}
        return value

    return {name: inside(value, str(name)) for name, value in values.items()}


def paths_of(values: dict[str, Any]) -> list[str]:
    """Returns all paths that ``map_paths`` would replace, in its order."""
    found: list[str] = []

    def note(path: str) -> str:
        found.append(path)
        return path

    map_paths(values, note)
    return found


def absolute(path: str) -> str:
    """Returns a path as one that means the same in every folder."""
    return os.path.abspath(Path(path).expanduser())


def started_text(run: Path, folder: Path | None = None) -> str:
    """Returns the text of started.json for a run whose paths are relative to a folder, the current one if None."""
    return json.dumps({"in": str(folder or Path.cwd()), "run": str(run.resolve())}, indent=2) + "\n"


def seen_from_here(values: dict[str, Any], run: Path) -> dict[str, Any]:
    """Returns the values of a run's config.yaml, with paths that mean the same files in the current folder.

    Args:
        values: as the file has them.
        run: the folder that holds it, or any other folder.

    Returns:
        The same values where the run was started in the current folder and has not moved; paths that lead nowhere stay.
    """
    bases, moved = bases_of(run)
    if not bases or (bases[0] == Path.cwd() and moved is None):
        return values

    def found(text: str) -> str:
        path = Path(text).expanduser()
        places = [base / path for base in bases]
        if moved is not None and path.is_relative_to(moved[0]):
            places.append(moved[1] / path.relative_to(moved[0]))
        return next((str(place) for place in places if os.path.exists(place)), text)

    return map_paths(values, found)


def as_stored(values: dict[str, Any], stored: dict[str, Any], run: Path) -> tuple[dict[str, Any], str]:
    """Returns the config, spelled as before, of a run that goes on in another folder than it was started in.

    Args:
        values: of its config now.
        stored: of its config.yaml; empty for a run that begins.
        run: its folder.

    Returns:
        The values for config.yaml, and the text of started.json.
    """
    bases, _ = bases_of(run)
    if not bases or not stored or bases[0] == Path.cwd():
        return values, started_text(run)
    seen = seen_from_here(stored, run)
    spelled = dict(zip(map(absolute, paths_of(seen)), paths_of(stored), strict=True))

    def spell(path: str) -> str:
        return spelled.get(absolute(path), absolute(path) if os.path.exists(absolute(path)) else path)

    return map_paths(values, spell), started_text(run, bases[0])


def bases_of(run: Path) -> tuple[list[Path], tuple[Path, Path] | None]:
    """Returns the folders that a run's relative paths may start from, likeliest first; and which folder has become another.

    Returns:
        Nothing where started.json is missing or no such file, as in an older run.
    """
    try:
        values = json.loads((run / STARTED_FILE).read_text(encoding="utf-8"))
        started, before = Path(values["in"]), Path(values["run"])
        now, copied = run.resolve(), os.path.exists(before)
    except (OSError, ValueError, KeyError, TypeError):
        return [], None
    if not (started.is_absolute() and before.is_absolute()):
        return [], None
    if now == before or copied:
        return [started], None
    pairs = zip(reversed(now.parts), reversed(before.parts), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    old, new = (Path(*path.parts[: len(path.parts) - common]) for path in (before, now))
    moved = new / started.relative_to(old) if started.is_relative_to(old) else started
    return [*dict.fromkeys([moved, started])] if os.path.isdir(moved) else [started], (old, new)
