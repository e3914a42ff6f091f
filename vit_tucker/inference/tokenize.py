"""Text files as files of tokens, by a tokenizer's name."""

from collections.abc import Sequence
from pathlib import Path

from vit_tucker.checkpoint.causal_lm import load_tokenizer
from vit_tucker.data.token_files import TokenFacts
from vit_tucker.data.tokenize import BYTES, Tokenizer, tokenize
from vit_tucker.errors import CheckpointError, ConfigError


def tokenize_files(
    files: Sequence[Path | str], tokenizer: str, out: Path | str, *, validation: float = 0.05
) -> dict[str, TokenFacts]:
    """Writes the tokens of text files as files for training and validation.

    Args:
        files: UTF-8 text.
        tokenizer: bytes, or a folder or hub name with a tokenizer of transformers.
        out: folder to write.
        validation: share of the text, its end, for validation.

    Returns:
        What the JSON files beside them have, by split.

    Raises:
        VitTuckerError: see ``open_tokenizer`` and ``vit_tucker.data.tokenize.tokenize``.
    """
    return tokenize([Path(file) for file in files], open_tokenizer(tokenizer), Path(out), validation)


def open_tokenizer(name: str) -> Tokenizer:
    """Opens a tokenizer for ``tokenize_files``.

    Args:
        name: bytes, or a folder or hub name with a tokenizer of transformers.

    Raises:
        ConfigError: there is none of this name, or transformers is not installed.
    """
    if name == BYTES.name:
        return BYTES
    try:
        found = load_tokenizer(name)
    except CheckpointError as error:
        raise ConfigError(f"--tokenizer {error}; --tokenizer {BYTES.name} goes without") from None

    def encode(text: str) -> Sequence[int]:
        tokens: list[int] = found(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    return Tokenizer(name, len(found), found.eos_token_id, encode)
