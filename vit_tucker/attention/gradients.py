"""The backward pass of our own operations."""

from typing import Any

from torch import Tensor


def register_gradients(operation: Any, backward: Any, tensors: int, options: int) -> None:
    """Registers the backward pass of an operation whose first output alone has gradients.

    Args:
        operation: (tensors, options, ...) -> outputs; those after the first are what the backward pass needs of the way there.
        backward: (gradient of the first output, the other outputs, tensors, options) -> gradients of the first tensors.
        tensors: how many inputs, from the first one on, are tensors or None.
        options: how many inputs after them the backward pass needs.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.inputs, ctx.options = len(inputs), inputs[tensors : tensors + options]
        ctx.save_for_backward(*output[1:], *inputs[:tensors])
        ctx.set_materialize_grads(False)  # else zeros are written for the outputs that have no gradient
        ctx.mark_non_differentiable(*output[1:])

    def gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found = () if dy is None else backward(dy, *ctx.saved_tensors, *ctx.options)
        return *found, *[None] * (ctx.inputs - len(found))

    operation.register_autograd(gradients, setup_context=keep)
