"""Runs side by side."""

import json
from pathlib import Path
from typing import Any

from vit_tucker.errors import ConfigError

COLUMNS = ("run", "attention", "attention params", "of dense", "params", "top-1 %", "top-5 %", "epochs", "train s")


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a finished run.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    file = folder / "results.json" if folder.is_dir() else folder
    if not file.is_file():
        raise ConfigError(f"{folder}: no results.json; the run is not finished, or this is no run folder")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None


def describe_attention(results: dict[str, Any]) -> str:
    """'dense', or the method with its options."""
    patch = results["patch"]
    if patch is None:
        return "dense"
    options = list(dict.fromkeys(layer["options"] for layer in patch["layers"]))
    return f"{patch['layers'][0]['method']} {options[0]}{' ...' if len(options) > 1 else ''}".strip()


def comparison(folders: list[Path]) -> str:
    """A table of finished runs, best weights of each.

    Args:
        folders: run folders.

    Returns:
        Lines of a Markdown table.
    """
    rows = [COLUMNS, tuple("---" if i < 2 else "---:" for i in range(len(COLUMNS)))]
    for folder in folders:
        results = read_results(folder)
        params, best = results["params"], results["best"]
        rows.append(
            (
                results["name"],
                describe_attention(results),
                f"{params['attention']:,}",
                f"{params['attention'] / params['dense_attention']:.1%}",
                f"{params['total']:,}",
                f"{best['top1']:.2f}",
                f"{best['top5']:.2f}",
                str(results["epochs"]),
                f"{results['train_seconds']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = []
    for number, row in enumerate(rows):
        if number == 1:
            row = tuple(("-" * (w - 1) + ":") if i > 1 else "-" * w for i, w in enumerate(widths))
        cells = [c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
