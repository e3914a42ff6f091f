"""Files of tokens: what is written is read, and files that are not what they should be give one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from vit_tucker.data.token_files import TokenWriter, dtype_for, open_tokens, verify_tokens
from vit_tucker.errors import DataError


def write(folder: Path, numbers: list[int], vocabulary: int = 300, split: str = "train", text_bytes: int = 7) -> Path:
    with TokenWriter(folder, split, "some", vocabulary) as writer:
        for start in range(0, len(numbers), 5):
            writer.write(numbers[start : start + 5], text_bytes)
    return folder / f"{split}.bin"


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_what_is_written_is_read(tmp_path, vocabulary, dtype):
    numbers = [0, vocabulary - 1, *range(10)]
    path = write(tmp_path, numbers, vocabulary)
    found = open_tokens(tmp_path, "train")
    assert found.tokens.tolist() == numbers
    assert isinstance(found.tokens, np.memmap)
    assert found.tokens.dtype == dtype == dtype_for(vocabulary)
    assert path.read_bytes() == np.array(numbers, dtype=dtype).tobytes()  # nanoGPT's layout
    assert (found.facts.tokens, found.facts.bytes, found.bytes_per_token) == (12, 21, 21 / 12)
    verify_tokens(found)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = write(tmp_path, [1, 2, 3])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def failing() -> None:
        with TokenWriter(tmp_path, "train", "other", 9) as writer:
            writer.write([4, 5], 2)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def changed(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def break_size(folder: Path) -> None:
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])


def forget_description(folder: Path) -> None:
    (folder / "train.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_size, r"train.bin: has 10 bytes, and 6 tokens of uint16 as in train.json are 12: it is torn"),
        (forget_description, r"train.bin: train.json is missing beside it, .*vit-tucker tokenize writes both"),
        (lambda folder: changed(folder / "train.json", dtype="int8"), r"train.json: dtype: .*'uint16'"),
        (
            lambda folder: changed(folder / "train.json", vocabular=3),
            r"train.json: vocabular: unknown key.*'vocabulary'",
        ),
        (lambda folder: (folder / "train.json").write_text("["), r"train.json: can't be read as JSON"),
        (lambda folder: (folder / "train.bin").unlink(), r"train.bin: no such file of tokens: it has no .bin files"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path, spoil, message):
    write(tmp_path, [1, 2, 3, 4, 5, 6])
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        open_tokens(tmp_path, "train")


def test_another_split_and_another_folder_are_named(tmp_path):
    write(tmp_path, [1, 2, 3], split="validation")
    with pytest.raises(DataError, match="it has validation; did you mean 'validation'"):
        open_tokens(tmp_path, "valid")
    with pytest.raises(DataError, match="no such folder"):
        open_tokens(tmp_path / "none", "train")


def test_a_file_of_somebody_else_needs_two_entries_only(tmp_path):
    np.array([5, 6, 7], dtype="uint16").tofile(tmp_path / "val.bin")
    (tmp_path / "val.json").write_text('{"dtype": "uint16", "vocabulary": 50257}')
    found = open_tokens(tmp_path, "val")
    assert (found.tokens.tolist(), found.bytes_per_token) == ([5, 6, 7], None)
    verify_tokens(found)


def test_changed_numbers_are_found_when_all_are_read(tmp_path):
    path = write(tmp_path, [1, 2, 3, 4, 5, 6], vocabulary=10)
    path.write_bytes(np.array([1, 2, 3, 4, 5, 7], dtype="uint16").tobytes())
    with pytest.raises(DataError, match=r"train.bin: has changed since it was written"):
        verify_tokens(open_tokens(tmp_path, "train"))
    changed(tmp_path / "train.json", sha256=None, vocabulary=7)
    with pytest.raises(DataError, match=r"train.bin: token 5 is 7, and its vocabulary has 7 tokens"):
        verify_tokens(open_tokens(tmp_path, "train"))
