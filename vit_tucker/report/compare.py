"""Runs side by side, and their small files kept for the record."""

import shutil
from pathlib import Path
from typing import Any

from vit_tucker.errors import ConfigError
from vit_tucker.report.collect import checked_results
from vit_tucker.show.measures import measures_in
from vit_tucker.show.tables import decimal, markdown, share
from vit_tucker.storage.json_files import read_object
from vit_tucker.storage.paths import checked_name

KEPT_FILES = ("config.yaml", "summary.csv", "results.json")


def read_results(folder: Path) -> dict[str, Any]:
    """Reads results.json of a finished run.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    file = folder / "results.json" if folder.is_dir() else folder
    if not file.is_file():
        raise ConfigError(f"{folder}: no results.json; the run is not finished, or this is no run folder")
    return checked_results(read_object(file, ConfigError, all_finite=False), str(file))


def describe_attention(results: dict[str, Any]) -> str:
    """Returns 'dense', or the method with its options, or with the rule that chose its ranks."""
    patch = results["patch"]
    if patch is None:
        return "dense"
    ranks = results["config"]["attention"].get("ranks")
    if isinstance(ranks, dict):
        return f"{patch['layers'][0]['method']} {' '.join(f'{name}={value}' for name, value in ranks.items())}"
    options = list(dict.fromkeys(layer["options"] for layer in patch["layers"]))
    return f"{patch['layers'][0]['method']} {options[0]}{' ...' if len(options) > 1 else ''}".strip()


def linear_method(config: dict[str, Any]) -> str | None:
    """Returns the method that replaces a config's linear layers; None for the host's own."""
    section = config.get("linear")
    return None if section is None else str(section["method"])


def compared_rows(folders: list[Path]) -> list[dict[str, Any]]:
    """Returns a row for each finished run of a comparison, as plain values.

    Raises:
        ConfigError: a run is not finished.
    """
    rows = []
    for folder in folders:
        results = read_results(folder)
        params, last = results["params"], results["last"]
        linear = linear_method(results["config"])
        attention = describe_attention(results) + (f", linear: {linear}" if linear else "")
        row = {"run": results["name"], "folder": str(folder), "attention": attention}
        row |= {"attention_params": params["attention"], "of_dense": params["attention"] / params["dense_attention"]}
        first, second = measures_in(last)
        row |= {"params": params["total"], first.column: last[first.column]}
        row |= {
            f"best_{first.name}": results["best"] and results["best"][first.name],
            second.column: last[second.column],
        }
        rows.append({**row, "epochs": results["epochs"], "train_seconds": results.get("train_seconds")})
    return rows


def comparison(folders: list[Path]) -> str:
    """Returns a Markdown table of finished runs: scores after the last epoch, and of the best one (on the same data).

    Raises:
        ConfigError: a run is not finished, or some are of images and some of text.
    """
    compared = compared_rows(folders)
    kinds = {measures_in(row): row["folder"] for row in compared}
    if len(kinds) > 1:
        raise ConfigError(
            f"{' and '.join(kinds.values())}: one is of images, one of text, which have no scores in common"
        )
    first, second = next(iter(kinds))
    columns = ("run", "attention", "attention params", "of dense", "params", first.heading, f"best epoch {first.unit}".strip(),
               second.heading, "epochs", "train s")  # fmt: skip
    rows = [
        (row["run"], row["attention"], f"{row['attention_params']:,}", share(row["of_dense"]), f"{row['params']:,}",
         decimal(row[first.column]), decimal(row[f"best_{first.name}"]), decimal(row[second.column]), str(row["epochs"]),
         decimal(row["train_seconds"], 0))
        for row in compared
    ]  # fmt: skip
    return markdown(columns, rows, text_columns=2)


def kept_name(folder: Path, results: dict[str, Any]) -> str:
    """Returns what a run's folder is called below that of a comparison.

    Raises:
        ConfigError: its results.json has a name that leads elsewhere.
    """
    try:
        return checked_name(f"{results['name']}-{results['config']['seed']}")
    except ValueError as error:
        raise ConfigError(f"{folder}: results.json: name: {error}") from None


def save_comparison(folders: list[Path], out: Path) -> None:
    """Copies config.yaml, summary.csv and results.json of each run below ``out``, and writes the table to its README.md.

    Raises:
        ConfigError: a run is not finished; nothing has been written.
    """
    table = comparison(folders)
    runs = [(folder, read_results(folder)) for folder in folders]
    places = [out / kept_name(folder, results) for folder, results in runs]
    lines = []
    for (folder, results), kept in zip(runs, places, strict=True):
        kept.mkdir(parents=True, exist_ok=True)
        for name in KEPT_FILES:
            shutil.copyfile(folder / name, kept / name)
        where = results["environment"]
        versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "timm", "accelerate"))
        lines.append(
            f"- `{kept.name}`: seed {results['config']['seed']}, {results['num_train']} training and "
            f"{results['data']['num_eval']} evaluation images, {results['processes']} process(es) on {where['device']}, "
            f"{versions}, finished {results['finished']}, commit {where['commit']}"
        )
    notes = "Written by `python -m vit_tucker compare RUNS... --save FOLDER`; top-1 and top-5 are those after the last epoch."
    (out / "README.md").write_text("\n".join([f"# {out.name}", "", table, "", *lines, "", notes, ""]))
