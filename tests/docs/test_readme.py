"""The front page is short, and its numbers are those of the files that it links to."""

import re
from pathlib import Path

import pytest

from docs.hooks import ROOT

TEXT = (ROOT / "README.md").read_text()
LINES = 200
LINK = re.compile(r"\]\((?P<file>[^)#]+)(?:#[\w-]+)?\)")
NUMBER = re.compile(r"(?<![\w.])\d[\d.,]*\d(?:k|x|%)?|(?<![\w.])\d(?:x|%)")


def result_rows(text: str) -> list[str]:
    """Returns the rows of the table below the heading Results."""
    section = text.split("\n## Results\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| [")]


def missing_numbers(row: str) -> list[str]:
    """Returns the numbers of a row's last cell that are not in the files that the row links to."""
    said = "\n".join((ROOT / link["file"]).read_text() for link in LINK.finditer(row))
    numbers = [number.rstrip(".,") for number in NUMBER.findall(row.rsplit("|", 2)[1])]
    assert numbers, row
    return [number for number in numbers if number not in said]


def test_it_is_short():
    assert len(TEXT.splitlines()) <= LINES


@pytest.mark.parametrize("row", result_rows(TEXT), ids=lambda row: row[3:20])
def test_results_are_those_of_the_linked_files(row):
    assert missing_numbers(row) == []


def test_other_numbers_are_found():
    row = next(row for row in result_rows(TEXT) if "6.28x" in row)
    assert missing_numbers(row.replace("6.28x", "6.29x")) == ["6.29x"]


def test_what_it_says_of_calibration_is_in_the_report():
    report = (ROOT / "experiments" / "results" / "README.md").read_text()
    differences = re.findall(r"[+-]\d\.\d\d \[[^]]+\]", TEXT)
    assert len(differences) == 3
    assert [difference for difference in differences if difference not in report] == []
    table = report.split("\n## How the attention starts\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in table if line.startswith("|")]
    study, method, start, settings_at, behind_at = (
        rows[0].index(x) for x in ("study", "method", "start", "settings", "behind")
    )
    found = [row for row in rows if row[method] == "Tucker" and row[start] == "activation-aware"]
    found = [row for row in found if not row[study].startswith("Ablations")]
    settings, behind = (sum(int(row[at]) for row in found) for at in (settings_at, behind_at))
    assert f"HOSVD is ahead in {behind} of {settings}\nsettings" in TEXT


def test_its_links_lead_somewhere():
    targets = {link["file"] for link in LINK.finditer(TEXT) if "://" not in link["file"]}
    targets |= set(re.findall(r'(?:srcset|src)="([^"]+)"', TEXT))
    assert len(targets) > 20
    assert [target for target in sorted(targets) if not Path(ROOT, target).exists()] == []
