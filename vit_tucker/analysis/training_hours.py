"""The expected time of a language model's training by the rule of 6 N D operations (Kaplan et al., arXiv 2001.08361).

A forward pass multiplies and adds each of N parameters once for each of D tokens, the backward pass twice as often. Attention's
products of queries, keys and values, 12 x layers x width x window operations for each token, come on top.
"""

from dataclasses import dataclass

from torch import nn

GPU, PEAK = "H100", 989e12
"""A GPU, and its operations per second in bf16 without sparsity, from its data sheet."""
MFU = 0.4
"""The share of its peak that a training reaches, an assumption: 38% to 43% are reported for LLaMA 3 on H100s."""


@dataclass(frozen=True)
class TrainingHours:
    """The expected cost of a training.

    Attributes:
        parameters: N, that each token is multiplied by.
        tokens: D, over all steps.
    """

    parameters: int
    tokens: int

    @property
    def operations(self) -> int:
        """Returns 6 N D, the operations of the whole training."""
        return 6 * self.parameters * self.tokens

    def hours(self, peak: float = PEAK, mfu: float = MFU) -> float:
        """Returns the hours of one GPU.

        Args:
            peak: its operations per second.
            mfu: the share of them that the training reaches.
        """
        return self.operations / (peak * mfu) / 3600

    def __str__(self) -> str:
        return (
            f"training: 6 x {self.parameters:,} parameters x {self.tokens:,} tokens = {self.operations:.2g} operations, about "
            f"{self.hours():,.3g} hours of one {GPU} at {MFU:.0%} of its {PEAK / 1e12:.0f} TFLOP/s in bf16"
        )


def count_multiplied(model: nn.Module) -> int:
    """Counts the parameters that a token is multiplied by: all but tables that are only looked up.

    Args:
        model: causal language model of transformers, dense or patched, on any device.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    looked_up = sum(table.numel() for table in tables.values() if head is None or table is not head.weight)
    return sum(parameter.numel() for parameter in model.parameters()) - looked_up
