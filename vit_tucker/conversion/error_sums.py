"""The error of a layer's output over many batches, of which only sums are kept."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ErrorSums:
    """Running sums for ||y^ - y|| / ||y - mean y||."""

    squares: float = 0.0
    total: float = 0.0
    count: int = 0
    mean_sum: Tensor | None = None

    def add(self, output: Tensor, y: Tensor) -> None:
        """Adds outputs and targets, both (..., O)."""
        y = y.double().flatten(0, -2)
        self.squares += (output.double().flatten(0, -2) - y).square().sum().item()
        self.total += y.square().sum().item()
        self.count += len(y)
        self.mean_sum = y.sum(0) if self.mean_sum is None else self.mean_sum + y.sum(0)

    def relative(self) -> float:
        """Returns the error; of a constant y against its norm."""
        if self.mean_sum is None:
            return 0.0
        variance = self.total - self.mean_sum.square().sum().item() / self.count
        return (self.squares / max(variance, 1e-12 * self.total, 1e-300)) ** 0.5
