"""Carries calibration tokens from block to block of a model, dense and with the layers that are converted so far.

A layer that is fitted to what the dense model hands it meets something else once the layers before it are converted too. Here
each layer is fitted to what it will meet. Where a block adds its layer's output to the tokens, the layer's target also makes up
for what earlier layers have put wrong: y + (h - h'), for the tokens h of the dense block and h' of the converted one.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from vit_tucker.attention.call import Call
from vit_tucker.attention.moments import LayerCall
from vit_tucker.conversion.blocks import Block, StopAtLayerError, adds_output, find_blocks, tokens_before
from vit_tucker.conversion.inputs import InputBatch
from vit_tucker.conversion.observe import CalibratedLayer, WatchedLayer, watching


class BlockStream:
    """The tokens before a layer's block in the dense model, and in the model with the layers that are converted so far.

    Args:
        model: dense, in eval mode; it stays as it is.
        layers: distinct modules of the model, in the order in which it calls them.
        inputs: batches.

    Raises:
        PatchError: layers that stand in no block of their own, or in one that is called more than once.
    """

    def __init__(self, model: nn.Module, layers: Sequence[WatchedLayer], inputs: Sequence[InputBatch]) -> None:
        self.model, self.inputs = model, inputs
        self.blocks = find_blocks(model, layers, inputs)
        self.converted: list[CalibratedLayer] = []
        self.dense: list[Tensor] = []
        self.current: list[Tensor] = []

    @torch.no_grad()
    def calls(self, layer: WatchedLayer, calls: Sequence[LayerCall]) -> list[LayerCall]:
        """Returns the calls of a layer in the model whose earlier layers are converted, with the outputs that are wanted of it.

        Args:
            layer: the next one; all before it have been added.
            calls: of it in the dense model, one for each batch.
        """
        block = self.blocks[layer.name]
        self._move_to(block)
        if not self.converted:
            return list(calls)
        makes_up = adds_output(block, layer, self.dense[0])
        found = []
        for number, call in enumerate(calls):
            seen = self._call_of(block, layer, number)
            y = call.y
            if makes_up:
                y = y + (self.dense[number] - self.current[number])
            found.append(replace(call, x=seen.x, y=y))
        return found

    @torch.no_grad()
    def add(self, layer: CalibratedLayer) -> None:
        """Counts a layer as converted: the tokens pass its block.

        Args:
            layer: of which the calls were asked for last; its replacement is in eval mode.
        """
        block = self.blocks[layer.name]
        self.converted.append(layer)
        self.dense = [block.run(number, tokens) for number, tokens in enumerate(self.dense)]
        with replaced([layer]):
            self.current = [block.run(number, tokens) for number, tokens in enumerate(self.current)]

    def _move_to(self, block: Block) -> None:
        if block.follows:
            return
        self.dense, self.current = block.tokens, block.tokens
        if self.converted:
            with replaced(self.converted):
                self.current = [tokens_before(self.model, block.module, batch) for batch in self.inputs]

    def _call_of(self, block: Block, layer: WatchedLayer, number: int) -> Call:
        calls: list[Call] = []

        def note(layer: WatchedLayer, call: Call, y: Tensor) -> None:
            calls.append(call)
            raise StopAtLayerError

        with watching([layer], note), suppress(StopAtLayerError):
            block.run(number, self.current[number])
        return calls[0]


def replaced(layers: Sequence[CalibratedLayer]) -> AbstractContextManager[None]:
    """Has a model's dense layers return what their replacements make of their inputs.

    Args:
        layers: of the model, converted.
    """
    return watching(layers, lambda layer, call, y: layer.replacement.run(call))
