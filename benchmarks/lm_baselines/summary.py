"""Table and figure of all cells that are there."""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from lm_baselines.cells import DENSE
from lm_baselines.chat import answers_text
from lm_baselines.methods import METHODS
from lm_baselines.padding import padding_table
from vit_tucker.show import figures
from vit_tucker.show.tables import csv_text, decimal, markdown, share

COLUMNS = (
    "method",
    "stage",
    "cached_entries",
    "cache_share",
    "cache_bytes",
    "attention_params",
    "params_share",
    "lr",
    "seeds",
    "perplexity",
    "std",
    "variant",
)
PANELS = (
    ("cache_bytes", 1e3, "KV cache, kB per token in bfloat16"),
    ("attention_params", 1e6, "attention parameters, millions"),
)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Returns one row per method, number of entries and stage, in the order of ``COLUMNS``.

    A healed row is the mean over seeds at the learning rate with the lowest validation loss at the first seed.

    Args:
        folder: of the cells.
    """
    cells = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    rows, groups = [], defaultdict(list)
    for cell in cells:
        if cell.get("perplexity") is None:
            continue
        if cell["stage"] == "healed":
            groups[cell["method"], cell["entries"]].append(cell)
        else:
            rows.append({**cell, "seeds": "", "std": None, "lr": None})
    for group in groups.values():
        first = min(cell["seed"] for cell in group)
        best = min((cell for cell in group if cell["seed"] == first), key=lambda cell: cell["validation_loss"])
        found = [cell["perplexity"] for cell in group if cell["lr"] == best["lr"]]
        spread = statistics.stdev(found) if len(found) > 1 else None
        rows.append({**best, "seeds": len(found), "perplexity": statistics.mean(found), "std": spread})
    order = {"one-shot": 0, "healed": 1}
    return sorted(rows, key=lambda row: (-row["cached_entries"] // 1, order[row["stage"]], row["perplexity"]))


def describe_variant(variant: dict[str, Any] | None) -> str:
    """Returns a variant's options in one line."""
    options = {key: value for key, value in (variant or {}).items() if key != "calibration_loss"}
    return ", ".join(f"{key} {value}" for key, value in options.items())


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown.

    Args:
        rows: see ``read_rows``.
    """
    header = ("attention", "stage", "entries", "cache", "attention parameters", "perplexity", "seeds", "variant")
    cells = [
        (
            row["method"], row["stage"], f"{row['cached_entries']:g}", share(row["cache_share"]), share(row["params_share"]),
            decimal(row["perplexity"]) + (f" ± {decimal(row['std'])}" if row["std"] is not None else ""),
            f"{row['seeds']}", describe_variant(row["variant"]),
        )
        for row in rows
    ]  # fmt: skip
    return markdown(header, cells, 2)


def save_summary(folder: Path) -> None:
    """Prints the table, and writes results.csv, results.json, results.md and perplexity.png.

    Args:
        folder: with a folder cells.
    """
    rows = read_rows(folder / "cells")
    text = table(rows)
    print(text)
    if not rows:
        return
    flat = [{**row, "variant": describe_variant(row["variant"])} for row in rows]
    (folder / "results.csv").write_text(csv_text(COLUMNS, [[row[column] for column in COLUMNS] for row in flat]))
    (folder / "results.json").write_text(json.dumps([{c: row[c] for c in COLUMNS} for row in flat], indent=1) + "\n")
    settings = ", ".join(f"{key} {value}" for key, value in {**rows[-1]["settings"], **rows[-1]["versions"]}.items())
    (folder / "results.md").write_text(
        f"{text}\n\n{energy_line(folder)}{padding_text(folder)}{answers_text(folder)}{settings}; {rows[-1]['date']}.\n"
    )
    draw(rows, folder / "perplexity.png")


def energy_line(folder: Path) -> str:
    """Returns a sentence about the bases' energies, if they are there.

    Args:
        folder: with a folder cells.
    """
    file = folder / "cells" / "rotation_energy.json"
    if not file.exists():
        return ""
    rows = json.loads(file.read_text())["rows"]
    middle, real = (statistics.mean(row[key] for row in rows) for key in ("complex", "real"))
    lead = [row["complex"] - row["real"] for row in rows]
    return (
        f"Energy of the keys in as many components as a head has pairs, mean over layers: {share(middle)} in the complex "
        f"basis, "
        f"{share(real)} in RoRoPE's; by layer the complex one holds {100 * min(lead):.1f} to {100 * max(lead):.1f} points more."
        "\n\n"
    )


def padding_text(folder: Path) -> str:
    """Returns the table of caches and left padding, if it is there.

    Args:
        folder: with a folder cells.
    """
    file = folder / "cells" / "cacheshrink_padding.json"
    if not file.exists():
        return ""
    about = (
        "Largest errors of logits over the largest logit; cacheshrink with all entries, so that nothing else differs:"
    )
    return f"{about}\n\n{padding_table(json.loads(file.read_text())['rows'])}\n\n"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws perplexity over cache and over attention parameters, one-shot dashed and hollow, healed solid.

    Args:
        rows: see ``read_rows``.
        file: PNG.
    """
    methods = list(METHODS)
    dense = [row["perplexity"] for row in rows if row["method"] == DENSE]
    with figures.subplots(6.8, 2.8, 1, 2, sharey=True) as (figure, axes):
        for axis, (column, unit, label) in zip(axes, PANELS, strict=True):
            for i, method in enumerate(methods):
                for stage, line in (("one-shot", "--"), ("healed", "-")):
                    mine = [row for row in rows if row["method"] == method and row["stage"] == stage]
                    points = sorted((row[column] / unit, row["perplexity"]) for row in mine)
                    if points:
                        filled = figures.PALETTE[i] if stage == "healed" else "white"
                        axis.plot(*zip(*points, strict=True), line, marker=figures.SHAPES[i], markersize=4, linewidth=0.8,
                                  color=figures.PALETTE[i], markerfacecolor=filled, label=f"{method}, {stage}")  # fmt: skip
            for value in dense:
                axis.axhline(value, color="0.6", linewidth=0.8, zorder=0, label="dense")
            axis.set(xlabel=label, yscale="log")
        axes[0].set_ylabel("perplexity")
        axes[0].set_xscale("log")
        axes[0].xaxis.set_major_locator(
            figures.FixedLocator(figures.spaced([row["cache_bytes"] / 1e3 for row in rows]))
        )
        axes[0].yaxis.set_major_locator(figures.LogLocator(subs=(1, 2, 5)))
        for side in (axes[0].xaxis, axes[0].yaxis):
            side.set_minor_locator(figures.NullLocator())
            side.set_major_formatter(figures.FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes[1].legend(frameon=False, fontsize=5)
        figure.savefig(file, dpi=200)
