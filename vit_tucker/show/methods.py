"""Defines how tables and figures show an attention method: a class attribute of its config, read here without importing torch."""

from collections.abc import Mapping
from itertools import cycle

from pydantic import Field

from vit_tucker.validation.checked import Checked

FREE_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#999999")
FREE_MARKERS = ("v", "P", "X", "d")
"""For methods that bring none."""


class MethodDisplay(Checked):
    """Name, place, colour and marker of a method in tables and figures.

    What is left out has a fallback: the method's name, the last place, a free colour.
    """

    name: str = Field(default="", max_length=60, pattern=r"^[^\r\n|]*$", description="As papers write it.")
    order: float | None = Field(
        default=None, description="Place: dense 0, MHA 1, Tucker 2, GQA 3, MLA 4; last if null."
    )
    colour: str | None = Field(
        default=None, pattern=r"^#[0-9A-Fa-f]{6}$", description="Of lines and markers, '#0072B2'."
    )
    marker: str | None = Field(default=None, pattern=r"^[.ov^<>1-48spP*hH+xXDd|_]$", description="matplotlib's letter.")
    starts: dict[str, str] = Field(
        default={},
        description="Names of the values of the method's option conversion, its default first; '' if it has none.",
    )
    calibrated: str = Field(
        default="activation-aware {start}", description="A conversion that uses images; {start} is one of starts."
    )

    def place(self, method: str) -> tuple[float, str]:
        """Returns the key that methods are sorted by.

        Args:
            method: its name in configs.
        """
        return float("inf") if self.order is None else self.order, method

    def start(self, conversion: str | None, calibrated: bool) -> str:
        """Returns the name of a conversion.

        Args:
            conversion: as in the config; None in configs from before there was a choice, for the default.
            calibrated: for the tokens of some images.
        """
        conversion = conversion or next(iter(self.starts), "")
        plain = self.starts.get(conversion, conversion or "converted")
        return self.calibrated.replace("{start}", plain) if calibrated else plain


DENSE = MethodDisplay(name="dense", order=0, colour="#000000", marker="*")
MHA = MethodDisplay(name="MHA", order=1, colour="#000000", marker="D", starts={"": "copied"})
TUCKER = MethodDisplay(
    name="Tucker",
    order=2,
    colour="#0072B2",
    marker="o",
    starts={"hosvd": "HOSVD", "hooi": "HOOI"},
    calibrated="activation-aware",
)
GQA = MethodDisplay(name="GQA", order=3, colour="#D55E00", marker="s", starts={"mean": "mean-pool", "svd": "SVD"})
MLA = MethodDisplay(name="MLA", order=4, colour="#009E73", marker="^", starts={"": "joint SVD"})
SHIPPED = {"dense": DENSE, "mha": MHA, "tucker": TUCKER, "gqa": GQA, "mla": MLA}
"""Of the package's own methods, whose results need not repeat it, and of the dense host."""


def fill_in(displays: Mapping[str, MethodDisplay]) -> dict[str, MethodDisplay]:
    """Returns displays with names, and with colours and markers that no other method of the same figure has, by method."""
    free = {}
    for key, values in (("colour", FREE_COLOURS), ("marker", FREE_MARKERS)):
        taken = {getattr(display, key) for display in displays.values()}
        free[key] = cycle([value for value in values if value not in taken] or values)
    filled = {}
    for method, display in displays.items():
        changes = {key: next(values) for key, values in free.items() if getattr(display, key) is None}
        filled[method] = display.model_copy(update={"name": display.name or method, **changes})
    return filled
