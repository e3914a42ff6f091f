"""Files of tokens: a flat array of token numbers, which is mapped into memory, and a JSON file beside it that describes it.

``train.bin`` is nanoGPT's layout, 16-bit (32-bit for more than 65,536 different tokens) unsigned numbers in the machine's order,
without a header; ``train.json`` has what is needed to read it and to compare models of different tokenizers.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from vit_tucker.errors import DataError, nearest
from vit_tucker.storage.digests import sha256_of
from vit_tucker.storage.json_files import Strict, checked, read_object
from vit_tucker.storage.weights import replace_text, sync

SUFFIX = ".bin"
Count = Annotated[int, Field(ge=0, le=1 << 48)]


class TokenFacts(Strict):
    """Contents of the JSON file beside a file of tokens.

    Attributes:
        dtype: of a number.
        vocabulary: how many different tokens there are; numbers are below it.
        tokens: how many numbers the file has; unknown in a file that somebody else wrote.
        tokenizer: its name or folder.
        bytes: of the text that the tokens stand for, as UTF-8, for bits per byte.
        sha256: of the file of tokens, for ``data.check``.
    """

    dtype: Literal["uint16", "uint32"]
    vocabulary: Annotated[int, Field(ge=1, le=1 << 32)]
    tokens: Count | None = None
    tokenizer: str | None = None
    bytes: Count | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens that is open for reading.

    Attributes:
        path: of the numbers.
        facts: of the JSON file beside it.
        tokens: (count,), mapped into memory.
    """

    path: Path
    facts: TokenFacts
    tokens: np.ndarray

    @property
    def bytes_per_token(self) -> float | None:
        """Returns how long a token is on average in the text; None where the text's size is not known."""
        return None if self.facts.bytes is None else self.facts.bytes / len(self.tokens)


def dtype_for(vocabulary: int) -> Literal["uint16", "uint32"]:
    """Returns the narrower type that holds all token numbers."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def open_tokens(folder: Path, split: str) -> TokenFile:
    """Opens a split of a folder of tokens.

    Args:
        folder: as ``data.root`` names it.
        split: 'train' of train.bin and train.json.

    Raises:
        DataError: a file is missing or not of that kind, or has another size than it should.
    """
    path = folder / f"{split}{SUFFIX}"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob(f"*{SUFFIX}"))
        found = f"it has {', '.join(known)}{nearest(split, known)}" if known else "it has no .bin files"
        advice = found if folder.is_dir() else "no such folder"
        raise DataError(f"{path}: no such file of tokens: {advice}; vit-tucker tokenize makes them from text")
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise DataError(
            f'{path}: {beside.name} is missing beside it, which describes the numbers: {{"dtype": "uint16", "vocabulary": '
            "50257} at least; vit-tucker tokenize writes both"
        )
    facts = checked(TokenFacts, read_object(beside, DataError), str(beside), DataError)
    size, width = path.stat().st_size, np.dtype(facts.dtype).itemsize
    if facts.tokens is not None and size != facts.tokens * width:
        raise DataError(
            f"{path}: has {size:,} bytes, and {facts.tokens:,} tokens of {facts.dtype} as in {beside.name} are "
            f"{facts.tokens * width:,}: it is torn or another file"
        )
    if size % width or size < 2 * width:
        raise DataError(f"{path}: {size:,} bytes are no file of at least 2 tokens of {facts.dtype}")
    return TokenFile(path, facts, np.memmap(path, dtype=facts.dtype, mode="r"))


def verify_tokens(file: TokenFile) -> None:
    """Reads a whole file of tokens.

    Raises:
        DataError: it has another SHA-256 than it was written with, or numbers beyond the vocabulary.
    """
    if file.facts.sha256 is not None and sha256_of(file.path) != file.facts.sha256:
        raise DataError(f"{file.path}: has changed since it was written: another SHA-256 than in its .json file")
    for start in range(0, len(file.tokens), 1 << 24):
        part = file.tokens[start : start + (1 << 24)]
        if (largest := int(part.max())) >= file.facts.vocabulary:
            place = start + int(part.argmax())
            raise DataError(
                f"{file.path}: token {place:,} is {largest}, and its vocabulary has {file.facts.vocabulary} tokens"
            )


class TokenWriter:
    """Writes a file of tokens and the JSON file beside it, as a context; neither is there before both are whole.

    Args:
        folder: made if missing.
        split: 'train' for train.bin.
        tokenizer: name, for the JSON file.
        vocabulary: how many different tokens there are.
    """

    def __init__(self, folder: Path, split: str, tokenizer: str, vocabulary: int) -> None:
        self.path, self.tokenizer, self.vocabulary = folder / f"{split}{SUFFIX}", tokenizer, vocabulary
        self.dtype = dtype_for(vocabulary)
        self._beside = self.path.with_name(f".{self.path.name}.tmp")
        self._digest, self.tokens, self.bytes = hashlib.sha256(), 0, 0

    def __enter__(self) -> "TokenWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._beside.open("wb")
        return self

    def write(self, numbers: Any, text_bytes: int) -> None:
        """Appends tokens to the file.

        Args:
            numbers: sequence of ints below the vocabulary.
            text_bytes: of the text that they stand for.
        """
        data = np.asarray(numbers, dtype=self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(numbers)
        self.bytes += text_bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self._beside.unlink(missing_ok=True)
            return
        sync(self._beside)
        described = self.path.with_suffix(".json")
        described.unlink(missing_ok=True)  # of the file that is replaced now
        os.replace(self._beside, self.path)
        replace_text(described, self.facts().model_dump_json(indent=2) + "\n")

    def facts(self) -> TokenFacts:
        """Returns the contents of the JSON file for what is written so far."""
        return TokenFacts(
            dtype=self.dtype,
            vocabulary=self.vocabulary,
            tokens=self.tokens,
            tokenizer=self.tokenizer,
            bytes=self.bytes,
            sha256=self._digest.hexdigest(),
        )
