"""Tables 2 and 3 on real modules: transformers' GPT-2 and LLaMA of the paper's sizes, patched on the meta device, counted."""

from dataclasses import replace
from decimal import Decimal
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from vit_tucker.analysis.formulas import FORMULAS
from vit_tucker.analysis.kv_cache import count_kv_entries
from vit_tucker.analysis.published import KV_BYTES, PUBLISHED, PublishedRow, PublishedTable, compare_row
from vit_tucker.errors import how_to_install
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.transformers_library import import_transformers, quiet_transformers
from vit_tucker.patching.patch import patch

MEASURED = "of the model: counted on transformers' model, patched, without weights"


def build_published(table: PublishedTable) -> nn.Module:
    """Builds a table's model of transformers, of its sizes, on the meta device."""
    transformers: Any = import_transformers(table.model)
    sizes = table.sizes
    if table.model == "GPT-2":
        config = transformers.GPT2Config(n_embd=sizes.d, n_head=sizes.H, n_layer=table.layers, n_positions=sizes.N)
    else:
        config = transformers.LlamaConfig(
            hidden_size=sizes.d,
            num_attention_heads=sizes.H,
            num_key_value_heads=sizes.H,
            head_dim=sizes.d // sizes.H,
            num_hidden_layers=table.layers,
            max_position_embeddings=sizes.N,
        )
    with quiet_transformers(progress=False), torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def measure_row(table: PublishedTable, row: PublishedRow) -> tuple[Decimal, Decimal | None]:
    """Counts attention weights and KV cache of a row on the patched model, in the table's units.

    Biases are left out, as in the paper's formulas.

    Args:
        table: Table 2 or 3.
        row: of it.
    """
    model, sizes = build_published(table), replace(table.sizes, **row.options)
    patch(model, FORMULAS[row.method].config(sizes).unconverted(), keep_originals=False)
    weights = sum(
        parameter.numel()
        for layer in find_attention(model).values()
        for name, parameter in layer.named_parameters()
        if not name.endswith("bias")
    )
    entries = count_kv_entries(model)
    kv = None if entries is None else Decimal(entries * KV_BYTES) / 10**6
    return Decimal(weights * table.attention_bytes) / 10**6, kv


def published_rows(number: int) -> tuple[str, list[tuple[object, ...]], list[str]]:
    """Returns title, rows and notes of Table 2 or 3: formulas beside the printed numbers, and beside patched models.

    Args:
        number: 2 or 3; without transformers no models are built.
    """
    table, installed = PUBLISHED[number], find_spec("transformers") is not None
    dense = compare_row(table, table.rows[0])[0].value
    rows: list[tuple[object, ...]] = []
    for row in table.rows:
        values = compare_row(table, row)
        model: tuple[Decimal | None, Decimal | None] = measure_row(table, row) if installed else (None, None)
        counted = [
            None if found is None else str(value.rounded_alike(found))
            for found, value in zip(model, values, strict=True)
        ]
        (attention, kv) = ((str(x.rounded), x.printed, x.verdict) for x in values)
        of_mha = round(float(values[0].value / dense), 4)
        rows.append(
            (row.label, row.method, attention[0], counted[0], *attention[1:], of_mha, kv[0], counted[1], *kv[1:])
        )
    sizes = table.sizes
    title = f"Table {number}: {table.model} (d={sizes.d} H={sizes.H} N={sizes.N}, {table.layers} layers)"
    measured = MEASURED if installed else f"{MEASURED}, which needs {how_to_install('hf')}"
    notes = [f"attention: {table.attention_unit}; KV cache: {table.kv_unit}", measured]
    return title, rows, [*notes, *(f"{row.label}: {row.note}" for row in table.rows if row.note)]
