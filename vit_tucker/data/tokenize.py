"""Turns text files into files of tokens, a training and a validation split, piece by piece: no text need fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_tucker.data.token_files import TokenFacts, TokenWriter
from vit_tucker.errors import ConfigError, DataError
from vit_tucker.show.progress_bars import progress_bar
from vit_tucker.storage.paths import refuse_unwritable

PIECE = 1 << 20
"""Characters that are tokenized at once."""
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Tokenizer:
    """Turns text into token numbers.

    Attributes:
        name: for the JSON file.
        vocabulary: how many different tokens there are.
        end: the token that ends a text, None without.
        encode: text -> its tokens, without any that begin or end it.
    """

    name: str
    vocabulary: int
    end: int | None
    encode: Callable[[str], Sequence[int] | np.ndarray]


BYTES = Tokenizer("bytes", 256, None, lambda text: np.frombuffer(text.encode("utf-8"), np.uint8))
"""The tokenizer that needs nothing: the bytes of UTF-8."""


def tokenize(files: Sequence[Path], tokenizer: Tokenizer, out: Path, validation: float = 0.05) -> dict[str, TokenFacts]:
    """Writes the tokens of text files as train.bin and validation.bin, each with its JSON file.

    The end of the text, by bytes and at a line's end, is for validation. After each file comes the tokenizer's token that ends a
    text. Texts are tokenized in pieces of about a million characters that end with a line, so that a token never spans two lines
    there.

    Args:
        files: UTF-8 text, in their order.
        tokenizer: see ``Tokenizer``.
        out: folder to write.
        validation: share of the text for validation, from 0 to below 1; 0 writes no validation.bin.

    Returns:
        What the JSON files have, by split.

    Raises:
        DataError: a file is missing or no UTF-8, or a split has fewer than two tokens. ConfigError: the folder can't be written.
    """
    if not 0 <= validation < 1:
        raise ConfigError(f"--validation {validation:g}: a share of the text from 0 to below 1")
    refuse_unwritable("--out", out, folder=True)
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such text file")
    total = sum(file.stat().st_size for file in files)
    limit = total - round(validation * total)
    writers = {TRAIN: TokenWriter(out, TRAIN, tokenizer.name, tokenizer.vocabulary)}
    if validation:
        writers[VALIDATION] = TokenWriter(out, VALIDATION, tokenizer.name, tokenizer.vocabulary)
    with progress_bar(total=total, what="tokenizing", unit="bytes") as bar:
        pieces = split_pieces(files, limit, bar)
        for split, writer in writers.items():
            with writer:
                for piece, ends in pieces[split]:
                    writer.write(tokenizer.encode(piece), len(piece.encode("utf-8")))
                    if ends and tokenizer.end is not None:
                        writer.write([tokenizer.end], 0)
                if writer.tokens < 2:
                    raise DataError(
                        f"{split}: {writer.tokens} tokens; too little text for a validation share of {validation:g}"
                    )
    return {split: writer.facts() for split, writer in writers.items()}


def split_pieces(files: Sequence[Path], limit: int, bar: Any) -> dict[str, Iterator[tuple[str, bool]]]:
    """Returns the pieces of a training split and of the rest, to be read in this order.

    Args:
        files: UTF-8 text.
        limit: bytes after which the rest begins, at the next line's end.
        bar: counts bytes.
    """
    pieces, rest = read_pieces(files), list[tuple[str, bool]]()

    def first() -> Iterator[tuple[str, bool]]:
        done = 0
        for piece, ends in pieces:
            size = len(piece.encode("utf-8"))
            bar.update(size)
            if done + size <= limit:
                done += size
                yield piece, ends
                continue
            before = len(piece.encode("utf-8")[: limit - done].decode("utf-8", errors="ignore"))
            cut = piece.find("\n", before) + 1 or before
            if piece[:cut]:
                yield piece[:cut], ends and cut == len(piece)
            if piece[cut:]:
                rest.append((piece[cut:], ends))
            return

    def second() -> Iterator[tuple[str, bool]]:
        yield from rest
        for piece, ends in pieces:
            bar.update(len(piece.encode("utf-8")))
            yield piece, ends

    return {TRAIN: first(), VALIDATION: second()}


def read_pieces(files: Sequence[Path]) -> Iterator[tuple[str, bool]]:
    """Yields the text of files in pieces that end with a line, and whether a piece is its file's last.

    Raises:
        DataError: a file can't be read as UTF-8.
    """
    for file in files:
        try:
            with file.open(encoding="utf-8", newline="") as opened:
                piece = opened.read(PIECE) + opened.readline()
                while piece:
                    following = opened.read(PIECE)
                    following += opened.readline() if following else ""
                    yield piece, not following
                    piece = following
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: no UTF-8 text: {error.reason} at byte {error.start:,} of a piece") from None
        except OSError as error:
            raise DataError(f"{file}: can't be read: {error.strerror or error}") from None
