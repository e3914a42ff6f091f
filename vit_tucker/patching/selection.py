"""Selects modules as configs name them: full names with wildcards, regular expressions, indices and index ranges."""

import re
from collections.abc import Iterable, Sequence

from vit_tucker.errors import PatchError, nearest
from vit_tucker.validation.patterns import by_pattern

Item = int | str
Selection = Item | Iterable[Item]


def matches(item: Item, names: Sequence[str], noun: str = "attention module") -> set[str]:
    """Returns the names that one item selects, never none.

    Args:
        item: an index (negative from the end), an index range 'first-last' (inclusive; '6-' to the end), 're:' and a regular
            expression for the full name, or a full name with the wildcards * ? [].
        names: full names of the modules, in the model's order; indices count in it.
        noun: what one of them is, for messages.

    Raises:
        PatchError: nothing is selected; says what there is.
    """
    if isinstance(item, int) and not isinstance(item, bool):
        if not -len(names) <= item < len(names):
            raise PatchError(f"layer index {item} is outside 0..{len(names) - 1} ({len(names)} {noun}s)")
        return {names[item]}
    text = str(item).strip()
    span = re.fullmatch(r"(\d+)\s*-\s*(\d*)", text)
    if span or text.isdigit():
        first = int(span[1] if span else text)
        last = int(span[2]) if span and span[2] else (len(names) - 1 if span else first)
        if not first <= last < len(names):
            raise PatchError(f"layer range '{text}' is outside 0..{len(names) - 1} ({len(names)} {noun}s)")
        return set(names[first : last + 1])
    try:
        found = by_pattern(text, names)
    except ValueError as error:
        raise PatchError(f"layer pattern {error}") from None
    if not found:
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise PatchError(
            f"layer pattern '{text}' matches no {noun} (patterns are matched against full names: {listed})"
            f"{nearest(text, names)}"
        )
    return found


def select(selection: Selection | None, names: Sequence[str], noun: str = "attention module") -> list[str]:
    """Returns the names that any item of ``selection`` selects, in the model's order.

    Args:
        selection: names, indices or patterns; None for all.
        names: all names, in the model's order.
        noun: what they are, for messages.

    Raises:
        PatchError: an item selects nothing, or the selection is empty.
    """
    if selection is None:
        return list(names)
    items = [selection] if isinstance(selection, int | str) else list(selection)
    if not items:
        raise PatchError("the layer selection is an empty list; leave it out to select all layers")
    chosen = set().union(*(matches(item, names, noun) for item in items))
    return [name for name in names if name in chosen]
