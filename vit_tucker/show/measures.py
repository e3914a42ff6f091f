"""The numbers by which models are judged: how results name them, how they are shown, and which of two is better."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One number by which a model is judged after an epoch.

    Attributes:
        name: 'top1'; summary.csv has it as eval_top1.
        label: as it is shown, 'top-1'.
        unit: behind the number.
        lowest: whether the lowest is the best.
    """

    name: str
    label: str
    unit: str = ""
    lowest: bool = False

    @property
    def column(self) -> str:
        """Returns the column of summary.csv."""
        return f"eval_{self.name}"

    @property
    def stem(self) -> str:
        """Returns what files of its figures begin with, 'accuracy'."""
        return "accuracy" if self.unit else self.name

    @property
    def heading(self) -> str:
        """Returns the title of a column, 'top-1 %'."""
        return f"{self.label} {self.unit}".strip()

    def text(self, value: float) -> str:
        """Returns the measure with its ``value``, 'top-1 93.21%'."""
        return f"{self.label} {value:.{2 if self.unit else 3}f}{self.unit}"

    def better(self, value: float, other: float) -> bool:
        """Returns whether ``value`` is better than ``other``."""
        return value < other if self.lowest else value > other


IMAGE_MEASURES = (Measure("top1", "top-1", "%"), Measure("top5", "top-5", "%"))
TOKEN_MEASURES = (
    Measure("perplexity", "perplexity", lowest=True),
    Measure("bits_per_byte", "bits per byte", lowest=True),
)


def measures_in(row: Mapping[str, Any]) -> tuple[Measure, ...]:
    """Returns the measures of a row of summary.csv, or of the last row in results.json; the first one decides what is best."""
    return TOKEN_MEASURES if TOKEN_MEASURES[0].column in row else IMAGE_MEASURES
