"""Messages between the processes of a run beside gradients, over a CPU group of their own (gloo: no wait for the GPU).

A signal, a loss that is not finite or an unreadable image may meet one process only. After each step all of them vote and read
the result one step later, so that they stop after the same step and none waits; and where one fails in its set-up, all fail.
"""

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vit_tucker.errors import FailedError, PeerError, VitTuckerError, one_line

T = TypeVar("T")
FAILURE = "vit_tucker/failure"
"""Key of the processes' common store."""


@dataclass(frozen=True)
class VoteResult:
    """The reports of all processes, joined: what any of them has seen.

    Attributes:
        signal: number of a signal that one of them caught; 0 for none.
        diverged: one of them saw a loss that is not finite.
        faults: one of them met images that can't be read.
    """

    signal: int = 0
    diverged: bool = False
    faults: bool = False


class Coordinator:
    """Coordinates the processes of a run: votes, gathered values, and work that succeeds or fails in all of them.

    Args:
        rank, num_processes: this process, and how many there are; a single one needs no messages.
        timeout_minutes: how long to wait for the others.
    """

    def __init__(self, rank: int = 0, num_processes: int = 1, timeout_minutes: float = 10.0) -> None:
        self.rank, self.num_processes = rank, num_processes
        self.group: Any = None
        self.agreed = False  # a failure that all of them know
        if num_processes > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self._pending: tuple[Tensor, Any] | None = None

    def vote(self, signal: int = 0, diverged: bool = False, faults: bool = False) -> VoteResult:
        """Reports what this process has seen; every process must call this equally often.

        Args:
            signal: number of a signal that asked this process to stop, 0 for none.
            diverged: its loss or gradient is not finite.
            faults: it has new bad images.

        Returns:
            What any of them reported in the vote before this one; a single process gets its own report at once.
        """
        if self.group is None:
            return VoteResult(signal, diverged, faults)
        outcome = VoteResult()
        if self._pending is not None:
            flags, work = self._pending
            work.wait()
            seen = flags.tolist()
            outcome = VoteResult(seen[0], bool(seen[1]), bool(seen[2]))
        flags = torch.tensor([signal, int(diverged), int(faults)])
        self._pending = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, self.group, async_op=True)
        return outcome

    def gather(self, value: Any) -> list[Any]:
        """Returns the plain value of each process, in all of them."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.num_processes
        dist.all_gather_object(values, value, group=self.group)
        return values

    def union(self, lines: Iterable[str]) -> list[str]:
        """Returns all processes' lines, each once, sorted."""
        return sorted({line for lines_of_one in self.gather(list(lines)) for line in lines_of_one})

    def together(self, work: Callable[[], T]) -> T:
        """Runs some work on each process; if it fails on one, it fails on all, and none waits for a process that has ended.

        Raises:
            whatever ``work`` raises here; PeerError or VitTuckerError with the other's message if it failed elsewhere.
        """
        return self._agree(work)  # type: ignore[return-value]

    def main_first(self, work: Callable[[], T]) -> T:
        """Runs a function like ``together``, in the first process before the others: downloads are made once."""
        first = self._agree(work, here=self.rank == 0)
        later = self._agree(work, here=self.rank != 0)
        return first if self.rank == 0 else later  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs some work on the first process only; all get its plain result, or fail with it."""
        return self.gather(self._agree(work, here=self.rank == 0))[0]

    def tell(self, error: Exception) -> None:
        """Stores a failure of this process alone, for ``ask``; the others will lose contact soon."""
        with contextlib.suppress(RuntimeError):  # the process that keeps the store may be gone
            if (store := self._store()) is not None:
                store.set(FAILURE, json.dumps([self.rank, isinstance(error, VitTuckerError), error_line(error)]))

    def ask(self) -> Exception | None:
        """Returns the failure that another process stored before it ended; None if none has, or where it can't be known."""
        try:
            if (store := self._store()) is None or not store.check([FAILURE]):
                return None
            rank, mistake, text = json.loads(store.get(FAILURE))
        except RuntimeError:  # the process that keeps the store is gone
            return None
        return (VitTuckerError if mistake else PeerError)(f"process {rank}: {text}")

    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store() if self.num_processes > 1 and dist.is_initialized() else None

    def _agree(self, work: Callable[[], T], here: bool = True) -> T | None:
        """Returns the result of some work, None where this process does none; raises the failure of the first one that fails."""
        result, failure = None, None
        if here:
            try:
                result = work()
            except Exception as error:
                failure = error
        reason = None if failure is None else (isinstance(failure, VitTuckerError), f"{failure}")
        for rank, other in enumerate(self.gather(reason)):
            if other is not None:
                self.agreed = True
                if failure is not None:
                    raise failure
                raise (VitTuckerError if other[0] else PeerError)(f"process {rank}: {other[1]}")
        return result


def error_line(error: Exception) -> str:
    """Returns an error's message in one line, with its type unless it is one of this package."""
    kind = "" if isinstance(error, VitTuckerError | FailedError) else f"{type(error).__name__}: "
    return kind + one_line(error)


class Mirror:
    """Copies small tensors of the device to the CPU one step late, without making the device wait."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def swap(self, value: Tensor) -> Tensor | None:
        """Stores ``value`` (any shape) and returns the one before it on the CPU, None at first; one on the CPU is not stored."""
        if value.device.type != "cuda":
            return value
        before = self._pending
        copy = torch.empty_like(value, device="cpu", pin_memory=True)
        copy.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = copy, event
        if before is None:
            return None
        before[1].synchronize()
        return before[0]
