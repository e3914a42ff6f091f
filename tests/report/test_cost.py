"""Cost tables from values."""

from vit_tucker.report.cost import LATENCY_COLUMNS, MODEL_COLUMNS, formula_table, model_table

VALUES = ["tucker ranks=[8,16,16]", 650688, 0.0225, 58869928, None, 1.5e6, 95_204_000, None]
TIMES = [12.34, 0.5, 0.45, 0.55, 2_500_000]


def test_one_table_in_three_formats():
    table = model_table("vit", [VALUES], ["a note"])
    lines = table.render("markdown").splitlines()
    assert lines[0] == "vit"
    assert lines[4].replace(" ", "") == "|tuckerranks=[8,16,16]|650,688|2.2%|58,869,928|-|1.5|95.20|-|"
    assert lines[-1] == "- a note"
    assert table.render("csv").splitlines() == [
        ",".join(column.key for column in MODEL_COLUMNS),
        '"tucker ranks=[8,16,16]",650688,0.0225,58869928,,1500000.0,95204000,',
    ]
    latex = table.render("latex")
    assert "tucker ranks=[8,16,16] & 650,688 & 2.2\\%" in latex
    assert "% a note" in latex


def test_latency_makes_the_table_longer():
    assert "time of dense" not in model_table("vit", [VALUES], []).render("markdown")
    table = model_table("vit", [[*VALUES, *TIMES]], [])
    assert len(table.header) == len(MODEL_COLUMNS) + len(LATENCY_COLUMNS)
    cells = table.render("markdown").splitlines()[-1].replace(" ", "").split("|")
    assert cells[-6:-1] == ["12.3", "0.500", "0.450", "0.550", "2.50"]


def test_formulas_stay_readable_in_latex():
    table = formula_table("d=8", [("MHA", "", "4 d^2", "2 N d", 256, 256, 16, None)])
    assert "4 d\\textasciicircum{}2" in table.render("latex")
    cells = table.render("markdown").splitlines()[4].replace(" ", "").split("|")
    assert cells[-5:-1] == ["256", "256", "16", "-"]
