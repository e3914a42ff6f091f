"""The table of docs/idea_to_table.md is that of its run, whose settings.csv lies beside the page's figure."""

import csv
from collections.abc import Mapping, Sequence

from docs.hooks import ROOT
from vit_tucker.show.tables import count, markdown, share, spread

PAGE = ROOT / "docs" / "idea_to_table.md"
FILES = ROOT / "docs" / "images" / "idea_to_table"
HEADER = ("config", "method", "attention params", "of dense", "top-1 %")


def settings_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The page's columns of settings.csv, smallest attention last."""
    ordered = sorted(rows, key=lambda row: (row["config"] != "start", -float(row["attention_params"])))
    cells = [
        [
            row["config"],
            row["method"],
            count(float(row["attention_params"])),
            share(float(row["share_of_dense"])),
            spread(float(row["top1_mean"]), float(row["top1_std"])),
        ]
        for row in ordered
    ]
    return markdown(HEADER, cells, 2)


def test_the_table_is_that_of_the_run():
    with (FILES / "settings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert settings_markdown(rows) in PAGE.read_text()
    assert settings_markdown(rows[1:]) not in PAGE.read_text()


def test_the_page_s_sweep_has_the_table_s_rows():
    with (FILES / "settings.csv").open() as file:
        configs = {row["config"].partition("-")[0] for row in csv.DictReader(file)}
    assert configs == {"start", "mha", "narrow", "gqa", "tucker"}
    text = PAGE.read_text()
    assert all(f"name: {name}" in text for name in configs - {"start"})
