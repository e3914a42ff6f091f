"""Writes the cells of a patch report's table: numbers before and after, spans of several layers."""

from collections.abc import Callable, Sequence


def params_cells(before: int, after: int) -> tuple[str, ...]:
    """Returns two numbers of parameters, and the share of the second in the first, as two cells."""
    return f"{before:,} -> {after:,}", f"{after / before:.1%}" if before else ""


def share_cell(before: int | None, after: int | None) -> str:
    """Writes two numbers and the share of the second in the first; '-' where one is unknown."""
    return "-" if not before or after is None else f"{before:,} -> {after:,} ({after / before:.0%})"


def span(values: Sequence[float | None], written: Callable[[float], str]) -> str:
    """Writes values as '0.1 to 0.3', smallest and largest; as '0.1' where both look alike, '-' where one is unknown."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    return " to ".join(dict.fromkeys((written(min(known)), written(max(known)))))


def error_cell(value: float) -> str:
    """Writes a relative error with four decimals, or its order of magnitude where it is below them."""
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


def flops_cell(before: int | None, after: int | None) -> str:
    """Writes operations before and after in millions; '-' where one is unknown."""
    return "-" if before is None or after is None else f"{before / 1e6:,.1f} -> {after / 1e6:,.1f}"
