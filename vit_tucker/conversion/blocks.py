"""Finds the blocks of a model in which its attention layers stand, and runs them one by one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.conversion.inputs import InputBatch
from vit_tucker.conversion.observe import Layer, WatchedLayer, first, watching
from vit_tucker.errors import PatchError
from vit_tucker.show.progress_bars import progress_bar

SAME = 0.05
"""Share of a shift that may be missing where a block adds its layer's output: bfloat16 rounds the tokens to 0.004."""


class StopAtLayerError(Exception):
    """Ends a pass through a model, or a block, where its layer has been seen."""


@dataclass
class Block:
    """A module of the model in which one layer stands, and its calls, one for each batch.

    Attributes:
        name: of the module.
        module: whose first argument are the tokens.
        arguments: of each call, the tokens apart.
        tokens: of each call, (B, ..., C); empty for a block that gets what the block before it returned.
        follows: the block before it returned the tokens in all calls.
    """

    name: str
    module: nn.Module
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    follows: bool = True

    def is_known(self, batches: int) -> bool:
        """Returns whether there was one call for each of so many batches, and its tokens can be had."""
        return len(self.arguments) == batches and (self.follows or len(self.tokens) == batches)

    def run(self, number: int, tokens: Tensor) -> Tensor:
        """Returns what the block makes of tokens, (B, ..., C), in the call of a batch.

        Args:
            number: of the batch.
            tokens: (B, ..., C).
        """
        args, kwargs = self.arguments[number]
        return first(self.module(tokens, *args, **kwargs))


def find_blocks(model: nn.Module, layers: Sequence[Layer], inputs: Sequence[InputBatch]) -> dict[str, Block]:
    """Returns the blocks of layers by the layers' names, with their calls in the dense model.

    Args:
        model, layers, inputs: as of ``BlockStream``.

    Raises:
        PatchError: layers that stand in no block of their own, or in one that is called more than once.
    """
    blocks = {layer.name: Block(parent, model.get_submodule(parent)) for layer in layers
              if (parent := layer.name.rpartition(".")[0])}  # fmt: skip
    last: list[Any] = [None]

    def entered(block: Block) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = args[0] if args and isinstance(args[0], Tensor) else None
            block.arguments.append((args[1:], kwargs))
            block.follows &= tokens is not None and tokens is last[0]
            if tokens is not None:
                block.tokens.append(tokens)

        return hook

    def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        last[0] = output[0] if isinstance(output, tuple) and output else output

    handles = [block.module.register_forward_pre_hook(entered(block), with_kwargs=True) for block in blocks.values()]
    handles += [block.module.register_forward_hook(left) for block in blocks.values()]
    try:
        with torch.no_grad():
            for batch in progress_bar(inputs, what="tokens of blocks", unit="batches"):
                last[0] = None
                batch.features(model)
                for block in blocks.values():
                    if block.follows:
                        block.tokens.clear()
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        alone = [block for block in blocks.values() if block.name == layer.name.rpartition(".")[0]]
        if len(alone) != 1 or not alone[0].is_known(len(inputs)):
            raise PatchError(
                f"{layer.name}: calibration: sequential=true needs layers in blocks of their own that are called once per pass, "
                "with the tokens as first argument; leave it out"
            )
    return blocks


def tokens_before(model: nn.Module, block: nn.Module, batch: InputBatch) -> Tensor:
    """Returns the tokens that a block gets in a pass of the model, which ends there.

    Args:
        model, block: the latter of the former.
        batch: of inputs.
    """
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise StopAtLayerError

    handle = block.register_forward_pre_hook(hook)
    try:
        batch.features(model)
    except StopAtLayerError:
        pass
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def adds_output(block: Block, layer: WatchedLayer, tokens: Tensor) -> bool:
    """Returns whether what is taken from a block's tokens can be added to its layer's output: the block's output is the same.

    Args:
        block, layer: dense.
        tokens: of the block's first call, (B, ..., C).
    """
    outputs: list[Tensor] = []
    with watching([layer], lambda layer, call, y: outputs.append(y)):
        expected = block.run(0, tokens)
    y = outputs[0]
    if y.shape != tokens.shape or y.ndim != 3:
        return False
    shift = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y) * y.std()
    with watching([layer], lambda layer, call, y: outputs[0] + shift):
        given = block.run(0, tokens - shift)
    return bool((given - expected).norm() <= SAME * shift.norm())
