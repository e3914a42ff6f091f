"""Progress bars of what takes long: on a terminal or in a notebook, with the time left, gone when it is done.

``TQDM_DISABLE=1`` in the environment switches all of them off, as it does for other users of tqdm.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
WANTED: ContextVar[bool | None] = ContextVar("progress", default=None)
"""Whether bars are shown: None where somebody looks, False never, True always."""
IN_NOTEBOOK = any(cls.__module__ == "tqdm.notebook" for cls in tqdm.__mro__)


@contextmanager
def showing_progress(wanted: bool | None) -> Iterator[None]:
    """Makes a context in which bars are shown always (True), never (False), or as outside of it (None)."""
    before = WANTED.set(WANTED.get() if wanted is None else wanted)
    try:
        yield
    finally:
        WANTED.reset(before)


def progress_bar(items: Iterable[Any] | None = None, *, total: int | None = None, what: str = "", unit: str) -> Any:
    """Makes a bar on standard error, a ``tqdm`` that is iterated over or updated.

    Args:
        items: what is iterated over; None for a bar that is updated.
        total: how many there are; the length of ``items`` if None.
        what: is done with them.
        unit: what is counted, in the plural.
    """
    return tqdm(items, total=total, desc=what, unit=f" {unit}", disable=hidden(), leave=False)


def hidden() -> bool | None:
    """Returns whether bars are hidden: always (True), never (False), or where standard error is no terminal (None)."""
    wanted = WANTED.get()
    off = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    return True if off or wanted is False else None if wanted is None and not IN_NOTEBOOK else False


def bars_are_shown() -> bool:
    """Returns whether a bar would be shown now, for libraries with bars of their own."""
    return not (hidden() if hidden() is not None else not sys.stderr.isatty())


def each(
    items: Collection[Item], what: str, unit: str, name: Callable[[Any], str] = attrgetter("name")
) -> Iterator[Item]:
    """Yields the items, with a bar that names the one that is worked on.

    Args:
        items: in their order.
        what: is done with them: 'converting'.
        unit: what they are, in the plural.
        name: returns the name of one; its attribute ``name`` if left out.
    """
    with progress_bar(total=len(items), what=what, unit=unit) as bar:
        for item in items:
            bar.set_description(f"{what} {name(item)}")
            yield item
            bar.update()
