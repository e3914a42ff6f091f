"""Reports what a patch does or would do, layer by layer: as objects, as a dict for JSON, and as a table for people."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vit_tucker.attention.base import ParameterCount
from vit_tucker.hosts.slot import ATTENTION, SLOTS
from vit_tucker.show.tables import plain


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
    """

    layers: tuple[LayerReport, ...]
    left_alone: tuple[str, ...] = ()
    applied: bool = True
    notes: tuple[str, ...] = ()
    slot: str = ATTENTION.name

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
            **{name: getattr(self, name) for name in ("params_before", "params_after", "flops_before", "flops_after")},
        }

    def __str__(self) -> str:
        slot = SLOTS[self.slot]
        header = ("module", "method", "options", f"{slot.name} params", "share", *slot.columns.values(),
                  "seconds", "MFLOPs/image")  # fmt: skip
        rows = []
        for x in self.layers:
            name = x.name if x.shared_with is None else f"{x.name} = {x.shared_with}"
            params = x.params_before.total, x.params_after.total
            errors = [_error(x.errors[key]) for key in slot.columns]
            rows.append((name, x.method, x.options, *_params(*params), *errors, *_costs(x)))
        count = f"{len(self.modules)} module{'s' if len(self.modules) != 1 else ''}"
        total = _params(self.params_before, self.params_after)
        rows.append((count, "", "", *total, *("" for _ in slot.columns), *_costs(self)))
        lines = [plain([header, *rows], left=range(3), rule_after=(0, len(self.layers)))]
        lines.append(f"{slot.legend}; FLOPs: 2 per multiply-add, {slot.name} layers only")
        if self.left_alone:
            lines.append(f"left alone ({len(self.left_alone)}): {', '.join(self.left_alone)}")
        lines += self.notes
        if not self.applied:
            lines.append("plan only: nothing was changed")
        return "\n".join(lines)


def _row_values(layer: LayerReport) -> dict[str, Any]:
    """Returns the plain values of a row, its errors beside the others; ``shared_with`` only where there is one."""
    values: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if name == "errors":
            values |= value
        elif name != "shared_with" or value is not None:
            values[name] = value._asdict() if isinstance(value, ParameterCount) else value
    return values


def _params(before: int, after: int) -> tuple[str, str]:
    return f"{before:,} -> {after:,}", f"{after / before:.1%}" if before else ""


def _total(values: list[int | None]) -> int | None:
    return None if any(v is None for v in values) else sum(v for v in values if v is not None)


def _error(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


def _costs(of: LayerReport | PatchReport) -> tuple[str, str]:
    """Returns the cells of seconds and operations."""
    seconds = "-" if of.seconds is None else f"{of.seconds:.1f}"
    if of.flops_before is None or of.flops_after is None:
        return seconds, "-"
    return seconds, f"{of.flops_before / 1e6:,.1f} -> {of.flops_after / 1e6:,.1f}"
