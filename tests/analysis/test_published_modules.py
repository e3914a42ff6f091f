"""Tables 2 and 3 on transformers' models: weights and caches of patched layers are the formulas', to the byte."""

import sys
from dataclasses import replace
from decimal import Decimal

import pytest

from vit_tucker.analysis.published import PUBLISHED, compare_row
from vit_tucker.analysis.published_modules import build_published, measure_row, published_rows

pytest.importorskip("transformers")
ROWS = [(table, row) for table in PUBLISHED.values() for row in table.rows]


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{table.model} {row.label}" for table, row in ROWS])
def test_a_patched_model_has_the_formulas_numbers(table, row):
    assert measure_row(table, row) == tuple(found.value for found in compare_row(table, row))


def test_another_rank_is_another_number():
    table = PUBLISHED[2]
    row = replace_options(table.rows[-1], r=(8, 64, 65))
    assert row.method == "Tucker"
    assert all(
        one > other for one, other in zip(measure_row(table, row), measure_row(table, table.rows[-1]), strict=True)
    )
    assert compare_row(table, row)[1].value == measure_row(table, row)[1]


def replace_options(row, **options):
    return row._replace(options=options)


def test_models_are_transformers_of_the_papers_sizes_without_memory():
    for table in PUBLISHED.values():
        model = build_published(table)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        config = model.config
        assert (config.hidden_size, config.num_attention_heads) == (table.sizes.d, table.sizes.H)
        assert (config.num_hidden_layers, config.max_position_embeddings) == (table.layers, table.sizes.N)


def test_rows_show_both_to_the_digits_that_are_printed():
    title, rows, notes = published_rows(2)
    assert title.startswith("Table 2: GPT-2")
    assert all(row[2] == row[3] and row[7] == row[8] for row in rows)
    assert Decimal(rows[0][3]) == Decimal("56.62")
    assert any("counted on transformers' model" in note for note in notes)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    _, rows, notes = published_rows(3)
    assert {row[3] for row in rows} == {None}
    assert any("vit_tucker[hf]" in note for note in notes)


def test_sizes_beyond_the_papers_can_be_counted():
    table = PUBLISHED[2]._replace(layers=2, sizes=replace(PUBLISHED[2].sizes, N=64))
    found = measure_row(table, table.rows[0])
    assert found == tuple(each.value for each in compare_row(table, table.rows[0]))
