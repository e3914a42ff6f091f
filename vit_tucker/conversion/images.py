"""The images of a calibration: collected from whatever yields batches, and checked against the model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.conversion.observe import evaluating, final_features
from vit_tucker.errors import PatchError, reason_of
from vit_tucker.hosts.images import input_shape
from vit_tucker.show.progress_bars import progress_bar


def collect_images(model: nn.Module, batches: Iterable[Any], limit: int) -> list[Tensor]:
    """Collects the first ``limit`` images, in batches, on the model's device and in its dtype.

    Args:
        model: whose images they are.
        batches: a tensor (B, channels, height, width), or batches of images, tensors or tuples that start with one.
        limit: how many at most.

    Raises:
        PatchError: nothing there, no image tensors, values that are not finite, or images that the model does not take.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    images: list[Tensor] = []
    count = 0
    with progress_bar(total=limit, what="reading calibration images", unit="images") as bar:
        for number, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
            images.append(tensor_of(batch, number)[: limit - count].to(like.device, like.dtype))
            if all(images[-1].shape[1:] != other.shape[1:] for other in images[:-1]):
                refuse_unfit_images(model, images[-1], number)
            count += len(images[-1])
            bar.update(len(images[-1]))
            if count >= limit:
                break
    if count == 0:
        raise PatchError("calibration: no images")
    return images


def tensor_of(batch: Any, number: int) -> Tensor:
    """Returns the images of a batch, a tensor or a tuple that starts with one, as a tensor that gradients can pass.

    Raises:
        PatchError: it has no images, or values that are not finite; names the batch by its number.
    """
    tensor = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or not tensor.is_floating_point():
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise PatchError(f"calibration: batch {number} is {shape}, not a float tensor (B, channels, height, width)")
    if not torch.isfinite(tensor).all():
        raise PatchError(f"calibration: batch {number} holds values that are not finite")
    return tensor.clone() if tensor.is_inference() else tensor


@torch.no_grad()
def refuse_unfit_images(model: nn.Module, images: Tensor, number: int) -> None:
    """Tries one of the images on the model.

    Args:
        model: whose images they are to be.
        images: a batch (B, channels, height, width).
        number: of the batch, for the message.

    Raises:
        PatchError: the model does not take their size or their number of channels.
    """
    if len(images) == 0:
        return
    try:
        with evaluating(model):
            final_features(model, images[:1])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models complain in many ways
        reason = reason_of(error)
        expected = "x".join(map(str, input_shape(model)))
        given = "x".join(map(str, images.shape[1:]))
        raise PatchError(
            f"calibration: batch {number}: {type(model).__name__} takes no images of {given}, its own are {expected}: {reason}"
        ) from None
