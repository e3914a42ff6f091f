"""Images that can't be read: how they are named, and how many of them a run may have."""

import re
from collections.abc import Iterable

from vit_tucker.errors import DataError

SHOWN = 3


def fault_line(name: str, split: str, error: BaseException, reason: str | None = None) -> str:
    """Returns one line for a bad image, the same one in every process and epoch.

    Args:
        name: path, or "image 17" where the data set has none.
        split: of the data set.
        error: what reading it raised.
        reason: in the place of the error's own text.
    """
    text = str(error) if reason is None else reason
    reason = next((line.strip() for line in text.splitlines() if line.strip()), "")
    reason = re.sub(r"( object)? at 0x[0-9a-fA-F]+", "", reason)  # an address would make two lines of one image
    return f"{name} of split '{split}': {type(error).__name__}{': ' if reason else ''}{reason}"


class FaultLog:
    """The distinct bad images of a run; more than ``limit`` of them stop it.

    Args:
        limit: ``data.max_bad_images``.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lines: dict[str, None] = {}  # a set that keeps its order

    @property
    def lines(self) -> tuple[str, ...]:
        """Returns the lines about bad images, in the order in which they were met."""
        return tuple(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, lines: Iterable[str]) -> tuple[str, ...]:
        """Adds bad images and returns those that were not known yet; raises DataError for more than the limit."""
        new = tuple(dict.fromkeys(line for line in lines if line not in self._lines))
        self._lines.update(dict.fromkeys(new))
        if len(self._lines) > self.limit:
            raise DataError(too_many(self.lines, self.limit))
        return new

    def merge(self, processes: Iterable[Iterable[str]]) -> tuple[str, ...]:
        """Adds the lines of all processes; called in each process alike, all logs are the same."""
        return self.add(line for lines in processes for line in lines)


def too_many(lines: tuple[str, ...], limit: int) -> str:
    """Returns the message for more bad images than allowed."""
    count = f"{len(lines)} images" if len(lines) != 1 else "1 image"
    more = f" (and {len(lines) - SHOWN} more)" if len(lines) > SHOWN else ""
    return f"{count} could not be read, data.max_bad_images allows {limit}: {'; '.join(lines[:SHOWN])}{more}"
