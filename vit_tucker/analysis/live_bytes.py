"""Counts the bytes that a piece of code has alive at once, on any device, by watching torch's operations."""

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context that notes all storages that operations make, backward passes included, and when they go.

    It sees every operation's results, and through weak references when their storages are freed.

    Args:
        kept: tensors that exist before and don't count; views of them don't either.
    """

    def __init__(self, kept: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._kept = {tensor.untyped_storage()._cdata for tensor in kept}
        self._numbers: dict[int, int] = {}  # of the storages that are alive
        self._sizes: list[float] = []  # of all storages, in the order in which they came
        self._events: list[tuple[int, bool]] = []  # number, and whether it came or went
        self._left_out: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._note(result.untyped_storage())
        return results

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._kept and key not in self._numbers:
            self._numbers[key] = len(self._sizes)
            self._events.append((len(self._sizes), True))
            self._sizes.append(storage.nbytes())
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._events.append((self._numbers.pop(key), False))

    def leave_out(self, tensor: Tensor) -> None:
        """Leaves out a noted ``tensor`` (any shape) from the count."""
        self._left_out.add(self._numbers.get(tensor.untyped_storage()._cdata, -1))

    def extrapolate(self, other: "LiveBytes", factor: float) -> "LiveBytes":
        """Returns what this would be with all sizes moved on by ``factor`` times their difference to those of ``other``.

        Raises:
            ValueError: the two did not make and free the same storages in the same order.
        """
        if self._events != other._events or self._left_out != other._left_out:
            raise ValueError("the model works differently on batches of different sizes")
        moved = copy.copy(self)
        moved._sizes = [a + factor * (b - a) for a, b in zip(self._sizes, other._sizes, strict=True)]
        return moved

    def peak(self) -> int:
        """Returns the highest sum of bytes alive at once."""
        live = highest = 0.0
        for number, came in self._events:
            if number not in self._left_out:
                live += self._sizes[number] if came else -self._sizes[number]
                highest = max(highest, live)
        return round(highest)
