"""Finds and reads the results of finished runs: run folders, results.json files, folders of runs, results.jsonl."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vit_tucker.errors import ConfigError, one_line
from vit_tucker.show.measures import measures_in
from vit_tucker.storage import json_files
from vit_tucker.storage.json_files import parse_object
from vit_tucker.storage.run_files import IGNORED_KEYS, RunResults

Results = dict[str, Any]

KEPT = "results.jsonl"
SWEEP = "sweep.yaml"
"""A sweep's file, kept beside its runs and its results."""
NEEDED = ("name", "config", "environment", "params", "patch", "data", "epochs", "best", "last", "finished")
NUMBERS = (
    "params.attention",
    "params.total",
    "params.dense_attention",
    "config.seed",
)
NAMING = ("name", "seed", "output_dir")
"""Keys that distinguish runs and affect nothing beyond the seed."""
NOT_COMPARED_KEYS = IGNORED_KEYS | {"train.cpu"}
"""Keys that do not distinguish settings: what a run computes is the same, beyond rounding."""


class Collection(NamedTuple):
    """The results that were found, and notes about what was left out.

    Attributes:
        results: of distinct runs, sorted.
        notes: what was left out, a line each.
    """

    results: tuple[Results, ...]
    notes: tuple[str, ...] = ()


def collect(paths: Sequence[Path]) -> Collection:
    """Collects the results of all finished runs at or below some paths.

    Args:
        paths: run folders, results.json files, folders that contain runs, results.jsonl files. A results.jsonl inside a folder is
            read only where the folder holds no runs: there it is what was kept of them.

    Raises:
        ConfigError: a path is not there, a file is not of that kind, or no run is finished.
    """
    found = [find_results(path) for path in paths]
    files, unfinished = (dict.fromkeys(path for part in parts for path in part) for parts in zip(*found, strict=True))
    results, notes = newest([entry for file in files for entry in results_in(file)])
    if unfinished:
        notes.append(f"not finished, left out: {', '.join(map(str, unfinished))}")
    if not results:
        raise ConfigError(f"{', '.join(map(str, paths))}: no finished run{f'; {notes[0]}' if notes else ''}")
    return Collection(tuple(sorted(results, key=sort_key)), tuple(notes))


def find_results(path: Path) -> tuple[list[Path], list[Path]]:
    """Returns files with results at or below a path, and folders of runs that are not finished.

    Raises:
        ConfigError: there is nothing.
    """
    if path.is_file():
        return [path], []
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder")
    files = sorted(path.rglob("results.json"))
    kept = [file for file in sorted(path.rglob(KEPT)) if not any(file.parent in run.parents for run in files)]
    runs = [config.parent for config in sorted(path.rglob("config.yaml"))]
    return files + kept, [run for run in runs if run / "results.json" not in files]


def results_in(file: Path) -> list[Results]:
    """Reads the results in a results.json, or in a results.jsonl, one per line.

    Raises:
        ConfigError: the file is no such thing.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read: {one_line(error, 120)}") from None
    parts = {str(file): text}
    if file.suffix == ".jsonl":
        parts = {f"{file}, line {number}": line for number, line in enumerate(text.splitlines(), start=1)}
    return [checked_results(parse_object(part, where, ConfigError, all_finite=False), where)
            for where, part in parts.items()]  # fmt: skip


def checked_results(entry: Any, where: str) -> Results:
    """Returns the results of a run, with all that tables need.

    Raises:
        ConfigError: a key is missing, or is no number where one is needed. The best epoch may be unknown (null).
    """
    missing = [key for key in NEEDED if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise ConfigError(f"{where}: not the results of a run: no '{missing[0]}'")
    last, *others = measures_in(entry["last"] or {})
    measured = [last.column] if last.lowest else [measure.column for measure in (last, *others)]
    keys = (*NUMBERS, *(f"last.{column}" for column in measured))
    for key in keys if entry["best"] is None else (*keys, f"best.{last.name}"):
        value: Any = entry
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: not the results of a run: '{key}' is {value!r}, not a number")
    json_files.checked(RunResults, entry, f"{where}: not the results of a run", ConfigError)
    return entry


def write_results(file: Path, results: Iterable[Results]) -> None:
    """Writes results, one per line."""
    file.write_text("".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in results))


def dotted_leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {'attention.ranks.0': 8, ...}: leaves of nested mappings and lists by dotted key, without nulls and empty ones."""
    if isinstance(value, dict | list):
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        nested = (dotted_leaves(part, f"{prefix}.{name}" if prefix else str(name)) for name, part in items)
        return {key: leaf for leaves in nested for key, leaf in leaves.items()}
    return {} if value is None else {prefix: value}


def written_config(results: Results) -> dict[str, Any]:
    """Returns what decides a run's result beside the seed, as its author wrote it: dotted keys, without ranks that a rule chose.

    Files of one seed (the dense start, a teacher) have ``*`` in its place, so that all seeds of one config agree.
    """
    config = {key: value for key, value in results["config"].items() if key not in NAMING}
    attention = config.get("attention")
    if attention is not None:
        rules = [rule for rule in attention.get("rules") or [] if rule.get("chosen_by") is None]
        config["attention"] = {**attention, "rules": rules}
    leaves = {key: leaf for key, leaf in dotted_leaves(config).items() if not is_below(key, NOT_COMPARED_KEYS)}
    seed = re.compile(rf"(seed|-){results['config']['seed']}(?=/|$)")
    return {key: seed.sub(r"\1*", leaf) if isinstance(leaf, str) else leaf for key, leaf in leaves.items()}


def is_below(key: str, names: Iterable[str]) -> bool:
    """Returns whether a dotted key is one of these, or inside one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def setting_key(results: Results) -> tuple[str, str]:
    """Returns what is equal for the seeds of one setting: its config and what it was evaluated on."""
    return json.dumps(written_config(results), sort_keys=True), json.dumps(results["data"], sort_keys=True)


def newest(entries: Sequence[Results]) -> tuple[list[Results], list[str]]:
    """Returns one run per config and seed, the last to finish (of one day: the last one given), and notes on the others."""
    chosen: dict[tuple[Any, ...], Results] = {}
    notes = []
    for entry in entries:
        key = (*setting_key(entry), entry["config"]["seed"])
        other = chosen.get(key)
        chosen[key] = entry if other is None else max(other, entry, key=lambda run: (run["finished"], run is entry))
        if other is not None and other != entry:
            notes.append(
                f"{entry['name']}, seed {entry['config']['seed']}: two runs of one config ({other['name']} of "
                f"{other['finished']}, {entry['name']} of {entry['finished']}); that of {chosen[key]['finished']} counts"
            )
    return list(chosen.values()), notes


def sort_key(results: Results) -> tuple[Any, ...]:
    """Returns what runs are sorted by: data set, host, name and seed."""
    config = results["config"]
    data, model = config["data"]["dataset"], config["model"]["name"]
    return data, model, str(results["name"]), setting_key(results), config["seed"]
