"""The numbers that the paper prints in its Tables 2 and 3, and what its formulas give for the same rows.

Source: Klein et al., Tucker Attention, arXiv 2603.30033, Tables 2 and 3. A number that is not known here is None.
"""

from dataclasses import replace
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import Any, NamedTuple

from vit_tucker.analysis.formulas import FORMULAS, Sizes


class PublishedRow(NamedTuple):
    """One row of a table as the paper prints it.

    Attributes:
        label: as printed.
        method: its row in Table 1.
        options: its letters.
        attention: attention parameters, as printed.
        kv: KV cache, as printed; None if not known here.
        note: what a reader should know.
    """

    label: str
    method: str
    options: dict[str, Any]
    attention: str
    kv: str | None = None
    note: str = ""


class PublishedTable(NamedTuple):
    """A table as printed, and the units of its numbers.

    Attributes:
        model: whose it is.
        sizes: of the model; a row adds its own letters.
        layers: attention layers.
        attention_unit, kv_unit: in words.
        attention_bytes: bytes per parameter; 1 where the table counts parameters.
        rows: the rows.
    """

    model: str
    sizes: Sizes
    layers: int
    attention_unit: str
    kv_unit: str
    attention_bytes: int
    rows: tuple[PublishedRow, ...]


KV_BYTES = 2
"""bf16."""
TABLE_2 = PublishedTable(
    model="GPT-2",
    sizes=Sizes(d=768, H=12, N=1024),
    layers=12,
    attention_unit="MB of 10^6 bytes in bf16",
    kv_unit="MB of 10^6 bytes in bf16, for 1024 tokens",
    attention_bytes=2,
    rows=(
        PublishedRow("MHA", "MHA", {}, "56.62", "37.74"),
        PublishedRow("GQA-4", "GQA", {"G": 4}, "37.74", "12.85", "the formula's KV cache with two digits swapped"),
        PublishedRow("GQA-2", "GQA", {"G": 2}, "33.02", "6.29"),
        PublishedRow("MLA 128", "MLA, shared latent", {"c": 128}, "26.00", "3.14"),
        PublishedRow("Tucker [8,128,128]", "Tucker", {"r": (8, 128, 128)}, "15.74", "6.28"),
        PublishedRow("Tucker [8,128,64]", "Tucker", {"r": (8, 128, 64)}, "10.24", "3.14"),
        PublishedRow("Tucker [8,64,64]", "Tucker", {"r": (8, 64, 64)}, "6.31", "3.14"),
    ),
)
TABLE_3 = PublishedTable(
    model="LLaMA3-1B",
    sizes=Sizes(d=2048, H=32, N=4096),
    layers=16,
    attention_unit="millions of parameters in 16 layers (the same numbers are MB in bf16 of 8 layers)",
    kv_unit="MB of 10^6 bytes in bf16, 16 layers, for 4096 tokens",
    attention_bytes=1,
    rows=(
        PublishedRow("MHA", "MHA", {}, "268"),
        PublishedRow("GQA-8", "GQA", {"G": 8}, "168"),
        PublishedRow("MQA", "MQA", {}, "138"),
        PublishedRow(
            "MLA-128",
            "MLA, separate latents",
            {"c": 128},
            "93.3",
            None,
            "separate latents are nearer than a shared one",
        ),
        PublishedRow("Tucker [32,128,128]", "Tucker", {"r": (32, 128, 128)}, "33.5"),
        PublishedRow("Tucker [32,128,64]", "Tucker", {"r": (32, 128, 64)}, "21.0"),
        PublishedRow("Tucker [32,64,64]", "Tucker", {"r": (32, 64, 64)}, "12.6"),
    ),
)
PUBLISHED = {2: TABLE_2, 3: TABLE_3}


class PrintedValue(NamedTuple):
    """A formula's value beside the printed one.

    Attributes:
        value: of the formula, in the table's unit.
        printed: None if not known.
    """

    value: Decimal
    printed: str | None

    @property
    def verdict(self) -> str:
        """Returns how the printed value compares with the formula's.

        'equal' if that rounds to it, 'cut' if its further digits are dropped there, '+0.27' for printed minus rounded value, '-'
        without a printed value.
        """
        if self.printed is None:
            return "-"
        printed = Decimal(self.printed)
        if self.rounded == printed:
            return "equal"
        if self.value.quantize(printed, ROUND_DOWN) == printed:
            return "cut"
        return f"{printed - self.rounded:+}"

    @property
    def rounded(self) -> Decimal:
        """Returns the value to the digits that are printed, two where none are."""
        return self.rounded_alike(self.value)

    def rounded_alike(self, value: Decimal) -> Decimal:
        """Returns another value to these digits."""
        return value.quantize(Decimal(self.printed or "0.01"), ROUND_HALF_UP)


def compare_row(table: PublishedTable, row: PublishedRow) -> tuple[PrintedValue, PrintedValue]:
    """Compares attention parameters and KV cache of a row, by formula and as printed."""
    formula, sizes = FORMULAS[row.method], replace(table.sizes, **row.options)
    attention = formula.count_weights(sizes) * table.layers * table.attention_bytes
    kv = formula.count_entries(sizes) * table.layers * KV_BYTES
    return PrintedValue(Decimal(attention) / 10**6, row.attention), PrintedValue(Decimal(kv) / 10**6, row.kv)
