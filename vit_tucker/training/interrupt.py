"""Signals that ask a run to stop, noted until its state can be saved."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
IMPATIENT_SECONDS = 2.0
"""A second Ctrl-C after this time stops at once; one before it is the launcher's echo of the first."""


@dataclass
class Signals:
    """Records the signal by which this process was asked to stop.

    Attributes:
        number: the first one caught; 0 for none.
    """

    number: int = 0
    _caught_at: float = field(default=0.0, repr=False)

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal by recording it; a second Ctrl-C, later, interrupts at once."""
        now = time.monotonic()
        if self.number and number == signal.SIGINT and now - self._caught_at > IMPATIENT_SECONDS:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._caught_at = number, now


@contextmanager
def catch_signals(signals: Signals, *numbers: int) -> Iterator[None]:
    """Records these signals inside the context instead of being ended by them.

    These are SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) if none are given.
    """
    try:
        before = {number: signal.signal(number, signals.catch) for number in numbers or STOPPING}
    except ValueError:  # not the main thread: whoever runs us there has the signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
