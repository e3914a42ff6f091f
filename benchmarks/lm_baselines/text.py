"""A text as blocks of tokens: for calibration, for training, for choices, and for the test, without overlap."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.errors import DataError
from vit_tucker.inference.perplexity import Perplexity, perplexity


class Splits(NamedTuple):
    """Blocks of tokens (blocks, N), from the text's beginning to its end.

    Attributes:
        calibration: what conversions see.
        training: what healing sees.
        validation: what decides the learning rate.
        test: what is reported; the text's last blocks.
        digest: of all tokens.
    """

    calibration: Tensor
    training: Tensor
    validation: Tensor
    test: Tensor
    digest: str


def split_text(file: Path, tokenizer: Any, calibration_tokens: int, length: int, validation: int, test: int) -> Splits:
    """Returns the splits of a text.

    Args:
        file: prose in UTF-8.
        tokenizer: of the model.
        calibration_tokens: the text's first ones, rounded down to whole blocks.
        length: N, tokens of a block.
        validation, test: blocks.

    Raises:
        DataError: the text can't be read or is too short.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from None
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    first, last = calibration_tokens // length, validation + test
    if len(blocks) <= first + last:
        need = (first + last + 1) * length
        raise DataError(
            f"{file} has {len(tokens)} tokens; calibration, training, validation and test need {need} or more"
        )
    calibration, training, chosen, tested = blocks.split([first, len(blocks) - first - last, validation, test])
    return Splits(calibration, training, chosen, tested, hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16])


def scored(model: nn.Module, blocks: Tensor, batch_size: int = 4) -> Perplexity:
    """Returns the score of all tokens but each block's first.

    Args:
        model: causal language model.
        blocks: (blocks, N).
        batch_size: blocks per call.
    """
    return perplexity(model, blocks.flatten(), window=blocks.shape[1], batch_size=batch_size)


def token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Returns the mean cross entropy of the tokens after the first.

    Args:
        model: a causal language model.
        batch: token ids (B, N).
    """
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Returns the parameters of several modules, each once.

    Args:
        modules: which may share some.
    """
    return list({id(p): p for module in modules for p in module.parameters()}.values())
