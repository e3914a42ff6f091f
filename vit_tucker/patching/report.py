"""Reports what a patch does or would do, layer by layer: as objects, as a dict for JSON, and as a table for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vit_tucker.attention.base import ParameterCount
from vit_tucker.hosts.slot import ATTENTION, SLOTS, Slot
from vit_tucker.patching.report_cells import error_cell, flops_cell, params_cells, share_cell, span
from vit_tucker.show.folded_names import fold_names
from vit_tucker.show.tables import plain

CALIBRATED = (
    "calibrated: the output error is what was minimised; errors of the weights also count what no token excites, and may "
    "exceed 1"
)
TOTALS = ("params_before", "params_after", "flops_before", "flops_after", "cached_before", "cached_after")
"""Sums over all modules in ``PatchReport.to_dict``; of caches only where there are some."""


@dataclass(frozen=True)
class LayerReport:
    """One replaced module: its parameters, errors and operations before and after.

    Attributes:
        name: full module name.
        method: method name.
        options: the method's options in words, 'ranks=8,16,16'.
        params_before, params_after: parameters of the layer.
        errors: relative errors by the keys of ``Slot.columns``; None where not converted, or not measured. Of attention:
            pre_error, post_error: Frobenius errors of the pre- and post-softmax weight tensors; output_error:
            ||y^ - y|| / ||y - mean y|| of the layer's output on the calibration tokens. Each is an attribute too.
        seconds: time of the conversion, passes through the model apart; None if not converted.
        flops_before, flops_after: operations per image (2 per multiply-add); None if the token count is unknown.
        cached_before, cached_after: numbers per token in a KV cache; None where tokens attend to later ones too, or if unknown.
        shared_with: full name of the first place at which the same module stands; None for a module of its own. The totals count
            its parameters and seconds once, and its operations at each place.
    """

    name: str
    method: str
    options: str
    params_before: ParameterCount
    params_after: ParameterCount
    errors: Mapping[str, float | None]
    seconds: float | None = field(compare=False)
    flops_before: int | None
    flops_after: int | None
    cached_before: int | None = None
    cached_after: int | None = None
    shared_with: str | None = None

    def __getattr__(self, name: str) -> float | None:
        errors: Mapping[str, float | None] = vars(self).get("errors", {})
        if name not in errors:
            raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")
        return errors[name]


@dataclass(frozen=True)
class PatchReport:
    """All replaced modules of a slot, and those left alone.

    Attributes:
        layers: replaced modules in the model's order.
        left_alone: full names of the modules that the selection leaves as they are, then of attention pooling and
            cross-attention.
        applied: False for a plan.
        notes: what else a reader should know.
        slot: what was replaced: 'attention' or 'linear'.
        unit: what operations are counted for: 'image', or '4,096 tokens' of a language model.
    """

    layers: tuple[LayerReport, ...]
    left_alone: tuple[str, ...] = ()
    applied: bool = True
    notes: tuple[str, ...] = ()
    slot: str = ATTENTION.name
    unit: str = "image"

    @property
    def modules(self) -> tuple[LayerReport, ...]:
        """Returns the replaced modules, each once, however many names it has."""
        return tuple(layer for layer in self.layers if layer.shared_with is None)

    @property
    def params_before(self) -> int:
        """Returns the number of parameters of the replaced modules before, biases included."""
        return sum(layer.params_before.total for layer in self.modules)

    @property
    def params_after(self) -> int:
        """Returns the number of parameters of the replaced modules after, biases included."""
        return sum(layer.params_after.total for layer in self.modules)

    @property
    def flops_before(self) -> int | None:
        """Returns the operations per image of the replaced modules before, None if unknown."""
        return _total([layer.flops_before for layer in self.layers])

    @property
    def flops_after(self) -> int | None:
        """Returns the operations per image of the replaced modules after, None if unknown."""
        return _total([layer.flops_after for layer in self.layers])

    @property
    def cached_before(self) -> int | None:
        """Returns the numbers per token in the KV caches of the replaced modules before, None if there are none."""
        return _total([layer.cached_before for layer in self.modules])

    @property
    def cached_after(self) -> int | None:
        """Returns the numbers per token in the KV caches of the replaced modules after, None if there are none."""
        return _total([layer.cached_after for layer in self.modules])

    @property
    def seconds(self) -> float | None:
        """Returns the time of all conversions in seconds, None if nothing was converted."""
        known = [layer.seconds for layer in self.modules if layer.seconds is not None]
        return sum(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "applied": self.applied,
            "layers": [_row_values(layer) for layer in self.layers],
            "left_alone": list(self.left_alone),
            "notes": list(self.notes),
            **{name: getattr(self, name) for name in TOTALS if getattr(self, name) is not None or "flops" in name},
        }

    def table(self, folded: bool = True) -> str:
        """Returns the report as a table with its notes.

        Args:
            folded: layers that are equal but for names and errors share a row, 'blocks.0-11.attn'; False: a row per layer.
        """
        slot, cached = SLOTS[self.slot], self.cached_after is not None
        header = ("module", "method", "options", f"{slot.name} params", "share", *(["KV cache/token"] if cached else []),
                  *slot.columns.values(), "seconds", f"MFLOPs/{self.unit}")  # fmt: skip
        rows = folded_rows(self.layers) if folded else [(row_name(layer), [layer]) for layer in self.layers]
        cells = [(name, *_cells(slot, layers, cached)) for name, layers in rows]
        total = params_cells(self.params_before, self.params_after)
        sums = ("-" if self.seconds is None else f"{self.seconds:.1f}", flops_cell(self.flops_before, self.flops_after))
        if cached:
            total += (share_cell(self.cached_before, self.cached_after),)
        cells.append((counted(self), "", "", *total, *("" for _ in slot.columns), *sums))
        lines = [plain([header, *cells], left=range(3), rule_after=(0, len(rows)))]
        each = "; parameters and FLOPs of each layer, errors and seconds from smallest to largest"
        together = each if len(rows) < len(self.layers) else ""
        lines.append(f"{slot.legend}; FLOPs: 2 per multiply-add, {slot.name} layers only{together}")
        if any(layer.errors.get("output_error") is not None for layer in self.layers):
            lines.append(CALIBRATED)
        if self.left_alone:
            names = fold_names(self.left_alone) if folded else self.left_alone
            lines.append(f"left alone ({len(self.left_alone)}): {', '.join(names)}")
        lines += self.notes
        if not self.applied:
            lines.append("plan only: nothing was changed")
        return "\n".join(lines)

    def summary(self) -> str:
        """Returns the report in one line: what was replaced by what, parameters, operations, errors."""
        slot = SLOTS[self.slot]
        methods = dict.fromkeys(f"{layer.method} {layer.options}".rstrip() for layer in self.layers)
        named = (
            next(iter(methods)) if len(methods) == 1 else f"{self.layers[0].method} with {len(methods)} sets of options"
        )
        before, after = params_cells(self.params_before, self.params_after)
        parts = [f"{counted(self)} by {named}", f"parameters {before} ({after})"]
        if self.flops_before is not None:
            parts.append(f"MFLOPs/{self.unit} {flops_cell(self.flops_before, self.flops_after)}")
        if self.cached_after is not None:
            parts.append(f"KV cache/token {share_cell(self.cached_before, self.cached_after)}")
        for key, title in slot.columns.items():
            if (errors := span([layer.errors[key] for layer in self.layers], error_cell)) != "-":
                parts.append(f"{title} {errors}")
        return "; ".join([*parts, *([] if self.applied else ["plan only"])])

    def __str__(self) -> str:
        return self.table()


def row_name(layer: LayerReport) -> str:
    """Returns a layer's name, and where its module stands first if that is elsewhere."""
    return layer.name if layer.shared_with is None else f"{layer.name} = {layer.shared_with}"


def counted(report: PatchReport) -> str:
    """Returns the number of replaced modules in words."""
    return f"{len(report.modules)} module{'s' if len(report.modules) != 1 else ''}"


def folded_rows(layers: Sequence[LayerReport]) -> list[tuple[str, list[LayerReport]]]:
    """Groups layers that are equal but for names, errors and seconds, and whose names differ in numbers alone.

    Returns:
        Name and layers of each group, in the order of their first layers.
    """
    alike: dict[tuple[Any, ...], dict[str, LayerReport]] = {}
    for x in layers:
        key = (x.method, x.options, x.params_before, x.params_after, x.flops_before, x.flops_after, x.shared_with)
        alike.setdefault(key, {})[x.name] = x
    rows = []
    for group in alike.values():
        for name, members in fold_names(group).items():
            first = group[members[0]]
            rows.append((row_name(replace(first, name=name)), [group[member] for member in members]))
    places = {layer.name: number for number, layer in enumerate(layers)}
    return sorted(rows, key=lambda row: places[row[1][0].name])


def _row_values(layer: LayerReport) -> dict[str, Any]:
    """Returns the plain values of a row, its errors beside the others; ``shared_with`` and caches only where there are some."""
    values: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if name == "errors":
            values |= value
        elif name not in ("shared_with", "cached_before", "cached_after") or value is not None:
            values[name] = value._asdict() if isinstance(value, ParameterCount) else value
    return values


def _total(values: list[int | None]) -> int | None:
    return None if any(v is None for v in values) else sum(v for v in values if v is not None)


def _cells(slot: Slot, layers: Sequence[LayerReport], cached: bool) -> tuple[str, ...]:
    """Returns the cells of a row behind its name: of layers that differ in errors and seconds alone."""
    first = layers[0]
    errors = [span([layer.errors[key] for layer in layers], error_cell) for key in slot.columns]
    seconds = span([layer.seconds for layer in layers], lambda value: f"{value:.1f}")
    params = params_cells(first.params_before.total, first.params_after.total)
    if cached:
        params += (share_cell(first.cached_before, first.cached_after),)
    return (first.method, first.options, *params, *errors, seconds, flops_cell(first.flops_before, first.flops_after))
