"""Tables 2 and 3: what the formulas give against what is printed."""

from decimal import Decimal

import pytest

from vit_tucker.analysis.formulas import FORMULAS, measure_layer
from vit_tucker.analysis.published import PUBLISHED, PrintedValue, compare_row


def verdicts(number):
    return {row.label: tuple(x.verdict for x in compare_row(PUBLISHED[number], row)) for row in PUBLISHED[number].rows}


def test_table_2_to_the_printed_digit_or_with_its_deviation():
    assert verdicts(2) == {
        "MHA": ("equal", "cut"),
        "GQA-4": ("cut", "+0.27"),
        "GQA-2": ("-0.01", "equal"),
        "MLA 128": ("+0.05", "cut"),
        "Tucker [8,128,128]": ("+0.01", "-0.01"),
        "Tucker [8,128,64]": ("+0.01", "cut"),
        "Tucker [8,64,64]": ("+0.01", "cut"),
    }


def test_table_3_to_the_printed_digit_or_with_its_deviation():
    assert verdicts(3) == {
        "MHA": ("equal", "-"),
        "GQA-8": ("equal", "-"),
        "MQA": ("equal", "-"),
        "MLA-128": ("+1.0", "-"),
        "Tucker [32,128,128]": ("cut", "-"),
        "Tucker [32,128,64]": ("equal", "-"),
        "Tucker [32,64,64]": ("equal", "-"),
    }


@pytest.mark.parametrize(
    ("value", "printed", "verdict"),
    [
        ("1.005", "1.01", "equal"),
        ("1.006", "1.00", "cut"),
        ("1.006", "1.02", "+0.01"),
        ("268.4", "268", "equal"),
        ("1", None, "-"),
        ("1", "2", "+1"),
    ],
)
def test_verdicts_by_hand(value, printed, verdict):
    assert PrintedValue(Decimal(value), printed).verdict == verdict


def test_the_papers_words():
    """[8,128,64] is about 18% of MHA and 39% of MLA; up to 9 times fewer than MHA."""
    table = PUBLISHED[2]
    attention = {row.label: float(compare_row(table, row)[0].value) for row in table.rows}
    middle = attention["Tucker [8,128,64]"]
    assert round(100 * middle / attention["MHA"]) == 18
    assert round(100 * middle / attention["MLA 128"]) == 39
    assert round(attention["MHA"] / attention["Tucker [8,64,64]"]) == 9
    assert round(attention["MHA"] / attention["Tucker [8,128,128]"]) != 9


def test_separate_latents_are_nearer_in_table_3():
    """What the note of that row says."""
    table = PUBLISHED[3]
    row = next(row for row in table.rows if row.label == "MLA-128")
    sizes = table.sizes.__class__(d=2048, H=32, N=4096, c=128)
    off = {
        method: abs(FORMULAS[method].count_weights(sizes) * 16 / 1e6 - float(row.attention))
        for method in ("MLA, shared latent", "MLA, separate latents")
    }
    assert off["MLA, separate latents"] < off["MLA, shared latent"]


@pytest.mark.parametrize("number", PUBLISHED)
def test_our_layers_have_what_the_formulas_say(number):
    table = PUBLISHED[number]
    for row in table.rows:
        sizes = type(table.sizes)(**{**vars(table.sizes), **row.options})
        formula = FORMULAS[row.method]
        assert measure_layer(formula, sizes) == (formula.count_weights(sizes), formula.count_entries(sizes))
