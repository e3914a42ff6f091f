"""Places where nothing can be written are refused before the work, by every command, in one line; nothing is created."""

import os
from pathlib import Path

import pytest

from vit_tucker.cli import main, train_main
from vit_tucker.errors import ConfigError
from vit_tucker.storage.paths import checked_name, checked_path, refuse_unwritable

RUN = Path(__file__).parents[1] / "experiments" / "results" / "digits" / "digits-dense-0"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder and a file, and the way there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "folder"),
    [("new", False), ("a/b/new", False), ("file", False), ("a/b", True), ("folder", True), ("folder/a", True)],
)
def test_what_can_be_written_passes_and_is_not_created(tree, path, folder):
    refuse_unwritable("--out", Path(path), folder)
    assert sorted(found.name for found in tree.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("path", "folder", "message"),
    [
        ("folder", False, "--out: {}/folder is a folder; name a file"),
        ("file/a/b", False, "--out: {}/file is a file; name a file elsewhere"),
        ("file", True, "--out: {}/file is a file; name another folder"),
        ("file/a", True, "--out: {}/file is a file; name another folder"),
    ],
)
def test_what_is_in_the_way_is_named(tree, path, folder, message):
    with pytest.raises(ConfigError) as error:
        refuse_unwritable("--out", Path(path), folder)
    assert str(error.value) == message.format(tree)


@pytest.mark.parametrize("path", ["folder/new", "file"])
def test_missing_permissions_are_refused(tree, monkeypatch, path):
    """Asked of the system, which lets root write everywhere: so the answer is ours here."""
    asked = []
    monkeypatch.setattr(os, "access", lambda place, mode: asked.append((place, mode)))
    with pytest.raises(ConfigError, match="can't be written to"):
        refuse_unwritable("--out", Path(path))
    assert asked == [(tree / path.removesuffix("/new"), os.W_OK)]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (main, ["hosts", "--filter", "vit_wee*", "--out", "file/map.md"]),
        (main, ["ranks", "vit_tiny_patch16_224", "--random", "--out", "file"]),
        (main, ["compare", str(RUN), "--save", "file"]),
        (train_main, ["--cfg", "tucker_r16.yaml", "output_dir=file"]),
    ],
    ids=["hosts", "ranks", "compare", "train"],
)
def test_every_command_checks_its_output_path_first(tree, capfd, command, arguments):
    assert command(arguments) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert f": {tree}/file is a file; name " in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert (tree / "file").read_text() == "kept"
    assert sorted(found.name for found in tree.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("text", ["a", "digits-dense", "a/b", "Ünïcode name", "a..b", "x" * 255])
def test_names_of_folders_inside(text):
    assert checked_name(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a/../../x",
        "../x",
        "/etc/x",
        "a/",
        "a//b",
        "a/./b",
        "a\0b",
        "a\nb",
        "a\u2028b",
        "a\x1b[2J",
        "x" * 256,
        "ü" * 128,
    ],
)
def test_names_that_lead_elsewhere_or_nowhere(text):
    with pytest.raises(ValueError, match=r"names no folder|can't have the character|file systems allow") as caught:
        checked_name(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["../x", "/abs/x", "~/x", "a b", "\u3000", "caf\udce9", "x/" * 2000])
def test_paths_may_lead_anywhere(text):
    assert checked_path(text) == text


@pytest.mark.parametrize("option", ["a\nb", "x" * 300, "y/" * 3000])
def test_options_are_paths(tree, option):
    with pytest.raises(ConfigError, match=r"^--out: a (path|name)"):
        refuse_unwritable("--out", Path(option))
    assert main(["convert", "vit_tiny_patch16_224", "--method", "gqa num_kv_heads=1", "--out", option]) == 2
