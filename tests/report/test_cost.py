"""Cost tables from values."""

from vit_tucker.report.cost import LATENCY_COLUMNS, MODEL_COLUMNS, formula_table, model_table

COST = {"label": "tucker ranks=[8,16,16]", "attention_params": 650_000, "params": 58_869_928, "attention_flops": None}
COST |= {"flops": 1.5e6, "activation_bytes": 95_204_000, "kv_bytes": None, "per": "image", "latency": None}
DENSE = {**COST, "label": "dense", "attention_params": 26_000_000}
LATENCY = {"ms": 12.34, "ratio": 0.5, "ratio_low": 0.45, "ratio_high": 0.55, "peak_bytes": 2_500_000}
LATENCY |= {"device": "cpu", "threads": 1, "turns": 15}


def test_one_table_in_three_formats():
    table = model_table("vit", [DENSE, COST], "bf16", 4)
    lines = table.render("markdown").splitlines()
    assert lines[0] == "vit: cost of attention"
    assert lines[5].replace(" ", "") == "|tuckerranks=[8,16,16]|650,000|2.5%|58,869,928|-|1.5|95.20|-|"
    assert lines[-1].startswith("- activations: of a training step in bf16 with batch size 4")
    assert table.render("csv").splitlines()[::2] == [
        ",".join(column.key for column in MODEL_COLUMNS),
        '"tucker ranks=[8,16,16]",650000,0.025,58869928,,1500000.0,95204000,',
    ]
    latex = table.render("latex")
    assert "tucker ranks=[8,16,16] & 650,000 & 2.5\\%" in latex
    assert "% activations: of a training step in bf16" in latex


def test_latency_makes_the_table_longer():
    assert "time of dense" not in model_table("vit", [COST], "no", 8).render("markdown").partition("\n- ")[0]
    table = model_table("vit", [{**COST, "latency": LATENCY}], "no", 8)
    assert len(table.header) == len(MODEL_COLUMNS) + len(LATENCY_COLUMNS)
    assert "on cpu, 1 thread(s)" in table.notes[-1]
    cells = table.render("markdown").splitlines()[4].replace(" ", "").split("|")
    assert cells[-6:-1] == ["12.3", "0.500", "0.450", "0.550", "2.50"]


def test_formulas_stay_readable_in_latex():
    table = formula_table("d=8", [("MHA", "", "4 d^2", "2 N d", 256, 256, 16, None)])
    assert "4 d\\textasciicircum{}2" in table.render("latex")
    cells = table.render("markdown").splitlines()[4].replace(" ", "").split("|")
    assert cells[-5:-1] == ["256", "256", "16", "-"]
