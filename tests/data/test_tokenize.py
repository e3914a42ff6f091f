"""Text files as tokens: nothing is lost between pieces, files and splits."""

from pathlib import Path

import pytest

from vit_tucker.data import tokenize as module
from vit_tucker.data.token_files import open_tokens
from vit_tucker.data.tokenize import BYTES, Tokenizer, read_pieces, tokenize
from vit_tucker.errors import ConfigError, DataError

TEXT = "Zürich 東京\nfirst line\n\n  second line\nthird\r\nlast 🙂 line without an end"


def files(folder: Path, *texts: str) -> list[Path]:
    made = [folder / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(made, texts, strict=True):
        file.write_bytes(text.encode("utf-8"))
    return made


def text_of(folder: Path, *splits: str) -> list[str]:
    return [bytes(open_tokens(folder, split).tokens.astype("uint8")).decode("utf-8") for split in splits]


def test_bytes_come_back_as_the_text(tmp_path):
    texts = [TEXT, TEXT * 3, "short\n"]
    facts = tokenize(files(tmp_path, *texts), BYTES, tmp_path / "out", validation=0.2)
    train, validation = text_of(tmp_path / "out", "train", "validation")
    assert train + validation == "".join(texts)
    assert train.endswith("\n")
    size = len("".join(texts).encode())
    assert len(train.encode()) == facts["train"].bytes == facts["train"].tokens >= 0.8 * size
    assert len(validation.encode()) == facts["validation"].bytes > 0.1 * size
    assert facts["train"].vocabulary == 256


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.95])
def test_any_share_of_one_line_is_cut_between_characters(tmp_path, share):
    tokenize(files(tmp_path, "🙂é" * 50), BYTES, tmp_path / "out", validation=share)
    train, validation = text_of(tmp_path / "out", "train", "validation")
    assert train + validation == "🙂é" * 50
    assert len(validation.encode()) / 300 == pytest.approx(share, abs=0.02)


def test_without_validation_there_is_one_file(tmp_path):
    assert list(tokenize(files(tmp_path, TEXT), BYTES, tmp_path / "out", validation=0)) == ["train"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["train.bin", "train.json"]
    assert text_of(tmp_path / "out", "train") == [TEXT]


def test_long_files_come_in_pieces_that_end_with_a_line(tmp_path):
    line = "x" * 99 + "\n"
    long = line * 30_000  # three pieces
    (whole,) = files(tmp_path, long)
    pieces = list(read_pieces([whole]))
    assert len(pieces) == 3
    assert "".join(piece for piece, _ in pieces) == long
    assert all(piece.endswith("\n") for piece, _ in pieces)
    assert [last for _, last in pieces] == [False, False, True]
    assert all(len(piece) <= module.PIECE + 100 for piece, _ in pieces)


def test_each_file_ends_with_the_token_for_that(tmp_path):
    words = Tokenizer("lengths", 100, 99, lambda text: [len(word) for word in text.split()])
    facts = tokenize(files(tmp_path, "a bb\nccc", "dddd\nee f"), words, tmp_path / "out", validation=0)
    assert open_tokens(tmp_path / "out", "train").tokens.tolist() == [1, 2, 3, 99, 4, 2, 1, 99]
    assert facts["train"].bytes == 17


def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    (good,) = files(tmp_path, TEXT)
    (bad := tmp_path / "bad.txt").write_bytes(b"abc\n\xff\xfe")
    with pytest.raises(DataError, match=r"bad.txt: no UTF-8 text"):
        tokenize([good, bad], BYTES, tmp_path / "out")
    with pytest.raises(DataError, match=r"none.txt: no such text file"):
        tokenize([tmp_path / "none.txt"], BYTES, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--validation 1: a share"):
        tokenize([good], BYTES, tmp_path / "out", validation=1)
    with pytest.raises(DataError, match=r"train: 0 tokens; too little text"):
        tokenize(files(tmp_path, ""), BYTES, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
