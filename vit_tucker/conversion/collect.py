"""Collects the images or token sequences of a calibration from whatever yields batches, and checks them against the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.conversion.inputs import Images, InputBatch, Tokens, reads_tokens
from vit_tucker.conversion.observe import evaluating
from vit_tucker.errors import PatchError, reason_of
from vit_tucker.hosts.images import input_shape
from vit_tucker.show.progress_bars import progress_bar

TOKENS_PER_PASS = 512
"""Longer batches of tokens are divided: the graph of a backward pass through a language model is large."""


def collect_inputs(model: nn.Module, batches: Iterable[Any], limit: int) -> list[InputBatch]:
    """Collects the first ``limit`` images or sequences, in batches, on the model's device.

    Args:
        model: whose inputs they are: a model of transformers reads tokens, any other images.
        batches: an iterable of batches, such as a DataLoader, or one batch. Of images: tensors (B, channels, height, width), or
            tuples that start with one. Of tokens: integer tensors (B, N), mappings with input_ids and, for padding,
            attention_mask, or tuples that start with one of these. Batches that were collected before stay as they are.
        limit: how many images or sequences at most.

    Raises:
        PatchError: nothing there, something else, values that are not finite, or inputs that the model does not take.
    """
    what = "sequences" if reads_tokens(model) else "images"
    read: Callable[[nn.Module, Any, int], Iterator[InputBatch]] = read_tokens if reads_tokens(model) else read_images
    found: list[InputBatch] = []
    count = 0
    with progress_bar(total=limit, what=f"reading calibration {what}", unit=what) as bar:
        for number, batch in enumerate([batches] if isinstance(batches, Tensor | Mapping) else batches):
            if isinstance(batch, Images | Tokens):
                found.append(batch)
                count += len(batch)
                continue
            for part in read(model, first_part(batch, limit - count), number):
                if all(shape_of(part) != shape_of(other) for other in found):
                    refuse_unfit(model, part, number)
                found.append(part)
                count += len(part)
                bar.update(len(part))
            if count >= limit:
                break
    if count == 0:
        raise PatchError(f"calibration: no {what}")
    return found


def first_part(batch: Any, most: int) -> Any:
    """Returns the first of a batch's inputs: of a tuple its first entry, of a mapping its tensors.

    Args:
        batch: whatever an iterable yields.
        most: how many of its rows at most.
    """
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        return {name: value[:most] for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    return batch[:most] if isinstance(batch, Tensor) and batch.ndim else batch


def shape_of(inputs: InputBatch) -> torch.Size:
    """Returns the shape of an image, or (): lengths of sequences differ from batch to batch."""
    return inputs.pixels.shape[1:] if isinstance(inputs, Images) else torch.Size()


def read_images(model: nn.Module, batch: Any, number: int) -> Iterator[Images]:
    """Yields the images of a batch, as a tensor that gradients can pass.

    Args:
        model: whose device and dtype they get.
        batch: (B, channels, height, width).
        number: of the batch, for messages.

    Raises:
        PatchError: it has no images, or values that are not finite; names the batch by its number.
    """
    if not isinstance(batch, Tensor) or batch.ndim != 4 or not batch.is_floating_point():
        shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise PatchError(f"calibration: batch {number} is {shape}, not a float tensor (B, channels, height, width)")
    if not torch.isfinite(batch).all():
        raise PatchError(f"calibration: batch {number} holds values that are not finite")
    like = next(p for p in model.parameters() if p.is_floating_point())
    yield Images((batch.clone() if batch.is_inference() else batch).to(like.device, like.dtype))


def read_tokens(model: nn.Module, batch: Any, number: int) -> Iterator[Tokens]:
    """Yields the sequences of a batch, in parts of TOKENS_PER_PASS tokens.

    Args:
        model: of transformers.
        batch: ids (B, N), or a mapping with them.
        number: of the batch, for messages.

    Raises:
        PatchError: it has no tokens, or some that the model does not know; names the batch by its number.
    """
    where = f"calibration: batch {number}"
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(batch if ids is None else ids).__name__
        raise PatchError(f"{where} is {found}, not an integer tensor (B, tokens) or a mapping with input_ids")
    if mask is not None and mask.shape != ids.shape:
        raise PatchError(
            f"{where}: attention_mask is {tuple(mask.shape)}, but input_ids are {tuple(ids.shape)}: one for each token"
        )
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        wrong = int(ids.max()) if int(ids.max()) >= known else int(ids.min())
        raise PatchError(f"{where} has token {wrong}, but {type(model).__name__} has {known}: another tokenizer's?")
    device = next(model.parameters()).device
    ids, valid = ids.long().to(device), None if mask is None else mask.to(device) != 0
    if ids.is_inference():
        ids = ids.clone()
    kept = torch.ones(len(ids), dtype=torch.bool, device=device) if valid is None else valid.any(1)
    ids, valid = ids[kept], None if valid is None else valid[kept]
    for rows in torch.arange(len(ids), device=device).split(max(1, TOKENS_PER_PASS // max(1, ids.shape[1]))):
        part = None if valid is None or bool(valid[rows].all()) else valid[rows]
        if len(rows):
            yield Tokens(ids[rows], part)


@torch.no_grad()
def refuse_unfit(model: nn.Module, inputs: InputBatch, number: int) -> None:
    """Tries one image, or one sequence, on the model.

    Args:
        model: whose inputs they are to be.
        inputs: a batch.
        number: of the batch, for the message.

    Raises:
        PatchError: the model does not take their size, their number of channels, or such sequences.
    """
    if len(inputs) == 0:
        return
    name = type(model).__name__
    try:
        with evaluating(model):
            first_of(inputs).features(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models complain in many ways
        reason = reason_of(error)
        if not isinstance(inputs, Images):
            raise PatchError(f"calibration: batch {number}: {name} does not run on it: {reason}") from None
        expected = "x".join(map(str, input_shape(model)))
        given = "x".join(map(str, inputs.pixels.shape[1:]))
        raise PatchError(
            f"calibration: batch {number}: {name} takes no images of {given}, its own are {expected}: {reason}"
        ) from None


def first_of(inputs: InputBatch) -> InputBatch:
    """Returns a batch of its first image or sequence."""
    if isinstance(inputs, Tokens):
        return Tokens(inputs.ids[:1], None if inputs.attention_mask is None else inputs.attention_mask[:1])
    assert isinstance(inputs, Images)
    return Images(inputs.pixels[:1])
