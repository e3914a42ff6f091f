"""Perplexity of a stored language model on a text file: model, tokenizer and tokens from their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vit_tucker.checkpoint.causal_lm import load_tokenizer
from vit_tucker.checkpoint.load import load_causal_lm
from vit_tucker.data.token_files import open_tokens
from vit_tucker.data.tokenize import BYTES, read_pieces
from vit_tucker.errors import CheckpointError, ConfigError, DataError
from vit_tucker.inference.perplexity import Perplexity, perplexity
from vit_tucker.inference.predict import run_config


@dataclass(frozen=True)
class Text:
    """The tokens of a text, and how many bytes each stands for.

    Attributes:
        ids: token numbers.
        token_bytes: of UTF-8; None where the tokenizer doesn't say.
        bos: the token that begins a text; None without.
        begins_with_bos: whether the tokenizer puts it there by itself.
    """

    ids: Sequence[int]
    token_bytes: Sequence[int] | None
    bos: int | None
    begins_with_bos: bool


def perplexity_of_text(
    model: nn.Module | str | Path,
    text: str | Path,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    batch_size: int = 1,
    bos: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Perplexity:
    """Computes the perplexity of a language model on a text file, see ``vit_tucker.inference.perplexity``.

    Args:
        model: a folder of ``vit_tucker.save``, a run folder, a folder or GGUF file of transformers, "owner/name" of the hub; or a
            model in memory, which stays as it is.
        text: file, UTF-8.
        tokenizer: of transformers; its folder or hub name, or "bytes"; the one beside the model, or of the run's data, if None.
        window, stride, batch_size: see ``perplexity``.
        tokens: only the first ones are scored; all if None.
        bos: begin each window with the tokenizer's first token; where the tokenizer does so with a text, if None.
        dtype, device: of a model that is loaded; the stored dtype, the CPU, if None.

    Raises:
        VitTuckerError: see ``load_causal_lm``, ``load_tokenizer``, ``perplexity``; or the text can't be read.
    """
    file = Path(text).expanduser()
    if not file.is_file():
        raise DataError(f"{file}: no such text file")
    found = read_text(file, open_tokenizer_of(model, tokenizer), tokens)
    if bos and found.bos is None:
        raise ConfigError("bos: the tokenizer has no token that begins a text")
    begins = found.begins_with_bos if bos is None else bos
    network = model if isinstance(model, nn.Module) else load_causal_lm(model, dtype=dtype, device=device)
    return perplexity(
        network,
        found.ids,
        window=window,
        stride=stride,
        batch_size=batch_size,
        bos=found.bos if begins else None,
        token_bytes=found.token_bytes,
    )


def open_tokenizer_of(model: nn.Module | str | Path, tokenizer: Any) -> Any:
    """Returns a tokenizer of transformers, or ``BYTES``.

    Args:
        model: that it is for.
        tokenizer: as of ``perplexity_of_text``.

    Raises:
        ConfigError: none is named, and none lies beside the model. CheckpointError: there is none of that name.
    """
    if tokenizer is not None:
        return named_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if isinstance(model, nn.Module):
        raise ConfigError("tokenizer: needed for a model in memory")
    if (run := run_config(model)) is not None and run.data.root is not None:
        facts = open_tokens(Path(run.data.root).expanduser(), run.data.val_split).facts
        if facts.tokenizer is not None:
            return named_tokenizer(facts.tokenizer)
    try:
        return load_tokenizer(model)
    except CheckpointError as error:
        hint = "; name one by --tokenizer" if Path(model).expanduser().exists() else ""
        raise CheckpointError(f"{error}{hint}") from None


def named_tokenizer(name: str | Path) -> Any:
    """Returns the tokenizer of a folder or hub name, or ``BYTES`` for its name."""
    return BYTES if str(name) == BYTES.name else load_tokenizer(name)


def read_text(file: Path, tokenizer: Any, tokens: int | None = None) -> Text:
    """Returns the tokens of a text file, as training reads it: in pieces of about a million characters.

    Args:
        file: UTF-8.
        tokenizer: of transformers, or ``BYTES``.
        tokens: the first ones only; all if None.

    Raises:
        DataError: it can't be read.
    """
    parts: list[tuple[Sequence[int], Sequence[int] | None]] = []
    count = 0
    for piece, _ in read_pieces([file]):
        ids, sizes = encode(piece, tokenizer)
        parts.append((ids, sizes))
        count += len(ids)
        if tokens is not None and count >= tokens:
            break
    ids = list(chain.from_iterable(part for part, _ in parts))[:tokens]
    known = all(sizes is not None for _, sizes in parts)
    sizes = list(chain.from_iterable(sizes or () for _, sizes in parts))[:tokens] if known else None
    bos = getattr(tokenizer, "bos_token_id", None)
    first = [] if tokenizer is BYTES else tokenizer("a")["input_ids"][:1]
    return Text(ids, sizes, bos, bos is not None and first == [bos])


def encode(text: str, tokenizer: Any) -> tuple[Sequence[int], Sequence[int] | None]:
    """Returns the tokens of a text, and how many bytes each stands for: those since the end of the one before it.

    Args:
        text: any.
        tokenizer: of transformers, or ``BYTES``; only fast ones of transformers know bytes.
    """
    if tokenizer is BYTES:
        ids = list(text.encode("utf-8"))
        return ids, [1] * len(ids)
    fast = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
    if not fast:
        return found["input_ids"], None
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (characters >= 0x80).astype(int) + (characters >= 0x800) + (characters >= 0x10000)
    before = np.concatenate([[0], np.cumsum(widths)])
    ends = (
        np.maximum.accumulate(before[[end for _, end in found["offset_mapping"]]]) if found["input_ids"] else before[:0]
    )
    return found["input_ids"], np.diff(ends, prepend=0).tolist()
