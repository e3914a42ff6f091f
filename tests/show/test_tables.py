"""Tables as Markdown, CSV and LaTeX."""

import csv
import io
import json

import pytest

from vit_tucker.show.tables import (
    Table,
    count,
    csv_text,
    decimal,
    escape_latex,
    latex,
    markdown,
    plain,
    share,
    short_count,
    spread,
)

HEADER = ("run", "top-1 %")
ROWS = [("a_b|c", "98.61 ± 0.20"), ("50%", "-")]


def test_markdown_lines_up_text_left_numbers_right():
    lines = markdown(HEADER, ROWS).splitlines()
    assert lines[0] == "| run    |      top-1 % |"
    assert lines[1] == "| ------ | -----------: |"
    assert lines[2] == r"| a_b\|c | 98.61 ± 0.20 |"
    assert len({len(line) for line in lines}) == 1
    assert markdown(("a",), []) == "| a   |\n| --- |"
    with pytest.raises(ValueError, match="zip"):
        markdown(HEADER, [("one cell",)])


def test_plain_text_lines_up_with_rules_as_long_as_the_table():
    rows = [HEADER, *ROWS, ("total", "")]
    assert plain(rows, left=(0,), rule_after=(0, 2)).splitlines() == [
        "run         top-1 %",
        "-------------------",
        "a_b|c  98.61 ± 0.20",
        "50%               -",
        "-------------------",
        "total",
    ]
    assert plain(rows, left=(0, 1)).splitlines()[2] == "50%    -"


def test_rules_without_colons_and_tables_that_do_not_line_up():
    rows = [("xyz", "1|2")]
    assert markdown(("a", "bcd"), rows, 2, colons=False).splitlines() == [
        "| a   | bcd  |",
        "|-----|------|",
        r"| xyz | 1\|2 |",
    ]
    assert markdown(("a", "bcd"), rows, aligned=False, colons=False).splitlines() == [
        "| a | bcd |",
        "|---|---|",
        r"| xyz | 1\|2 |",
    ]
    assert markdown(("a",), [], 1, colons=False) == "| a |\n|---|"


def test_one_table_in_all_formats(tmp_path):
    table = Table(
        HEADER, ROWS, 1, ("run", "top1"), [("a", 98.61), ("b", None)], ["a `note`"], "title", "runs", ("run",)
    )
    assert table.markdown().splitlines() == ["title", "", *markdown(HEADER, ROWS).splitlines(), "", "- a `note`"]
    assert table.latex() == latex(HEADER[1:], [row[1:] for row in ROWS], 0, "title\na note")
    assert json.loads(table.render("json")) == {
        "title": "title",
        "rows": [{"run": "a", "top1": 98.61}, {"run": "b", "top1": None}],
        "notes": ["a `note`"],
    }
    table.save(tmp_path)
    assert (tmp_path / "runs.csv").read_text() == table.render("csv") == "run,top1\na,98.61\nb,\n"
    assert (tmp_path / "runs.tex").read_text() == table.render("latex") == table.latex()


def test_latex_is_escaped_and_balanced():
    text = latex(HEADER, [*ROWS, ("[4.9, 7.7]", ">3 & <5")], note="made by\ntables.py")
    lines = text.splitlines()
    assert lines[:3] == ["% made by", "% tables.py", r"% needs \usepackage{booktabs}"]
    assert lines[3] == r"\begin{tabular}{lr}"
    assert r"a\_b|c & 98.61 $\pm$ 0.20 \\" in lines
    assert r"50\% & - \\" in lines
    assert r"{}[4.9, 7.7] & $>$3 \& $<$5 \\" in lines  # a bare [ after \\ would be its optional argument
    assert [lines.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}")] == [1] * 4
    assert text.count("$") % 2 == 0
    assert escape_latex("\\{x}^2~#$") == r"\textbackslash{}\{x\}\textasciicircum{}2\textasciitilde{}\#\$"


def test_csv_reads_back():
    text = csv_text(HEADER, [("a, b", 98.5), ("c", None)])
    assert list(csv.reader(io.StringIO(text))) == [list(HEADER), ["a, b", "98.5"], ["c", ""]]


@pytest.mark.parametrize(
    ("value", "written"),
    [(999, "999"), (1_000, "1k"), (50_240, "50.2k"), (264_192, "264k"), (999_600, "1M"), (1_277_952, "1.28M")],
)
def test_short_counts(value, written):
    assert short_count(value) == written


def test_numbers_that_are_missing_are_dashes():
    assert (count(50_240.4), count(None)) == ("50,240", "-")
    assert (decimal(1.005, 1), decimal(None)) == ("1.0", "-")
    assert (share(0.0225), share(None)) == ("2.2%", "-")
    assert (spread(98.611, 0.2), spread(98.611, None), spread(None, None)) == ("98.61 ± 0.20", "98.61 ± -", "-")
