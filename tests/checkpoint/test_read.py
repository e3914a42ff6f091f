"""Which file a path means, and what a file is that holds no weights."""

import argparse
import json
import re
import zipfile

import numpy as np
import torch
from safetensors.torch import save_file

from tests.checkpoint.loads import loaded, message_of
from tests.checkpoint.sources import vit


def test_shards_and_folders(tmp_path, small_images):
    """Sharded safetensors with an index, a lone pytorch_model.bin, DeepSpeed's folder, a folder with one file of any name."""
    source = vit()
    state = source.state_dict()
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    (tmp_path / "shards").mkdir()
    for name, keys in halves.items():
        save_file({key: state[key].contiguous() for key in keys}, str(tmp_path / "shards" / name))
    weight_map = {key: name for name, keys in halves.items() for key in keys}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin/pytorch_model.bin")
    (tmp_path / "deepspeed/global_step7").mkdir(parents=True)
    (tmp_path / "deepspeed/latest").write_text("global_step7")
    torch.save({"module": state}, tmp_path / "deepspeed/global_step7/mp_rank_00_model_states.pt")
    (tmp_path / "one").mkdir()
    torch.save(state, tmp_path / "one/epoch=3.ckpt")
    for folder in ("shards", "bin", "deepspeed", "one"):
        model, _ = loaded(tmp_path / folder)
        assert torch.equal(model(small_images), source(small_images)), folder
    (tmp_path / "shards/model-00002-of-00002.safetensors").unlink()
    assert "lists 2 shards, of which model-00002-of-00002.safetensors is missing" in message_of(tmp_path / "shards")
    torch.save(state, tmp_path / "one/epoch=4.ckpt")
    assert "has 2 weights files (epoch=3.ckpt, epoch=4.ckpt): name one of them" in message_of(tmp_path / "one")


def test_what_a_file_is_instead_of_weights(tmp_path):
    file = tmp_path / "w.pth"
    contents = {
        b"": r"w.pth is empty \(0 bytes\)",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1": "a Git LFS pointer .* git lfs pull",
        b"<!DOCTYPE html><html>": "a web page and not weights",
        b"\x80\x02garbage": "can't be read as weights: ",
    }
    for content, expected in contents.items():
        file.write_bytes(content)
        line = message_of(file)
        assert re.search(expected, line), line
        assert "weights_only" not in line
    for values, expected in (
        ({}, "contains no tensors: it is an empty mapping"),
        ({"state_dict": {}}, r"contains no tensors: it contains state_dict \(a dict of 0 entries\)"),
        ({"state_dict_ema": {}, "epoch": 3}, "contains no tensors: it contains state_dict_ema"),
        ([1, 2], "contains no tensors: it is a list"),
    ):
        torch.save(values, file)
        assert re.search(expected, message_of(file))
    torch.save({"optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3}, file)
    assert "contains no tensors: it contains optimizer (a dict of 1 entries), epoch (a int)" in message_of(file)
    (tmp_path / "w.onnx").write_bytes(b"\x08\x07")
    assert "w.onnx is an ONNX file; supported are safetensors" in message_of(tmp_path / "w.onnx")


def test_numbers_and_arguments_beside_the_weights_are_plain_values(tmp_path, small_images):
    """As training scripts save them; NumPy names its function otherwise since version 2."""
    source = vit()
    values = {"model": source.state_dict(), "best": np.float64(81.3), "epoch": np.int64(3), "folder": tmp_path}
    torch.save({**values, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "w.pth")
    model, _ = loaded(tmp_path / "w.pth")
    assert torch.equal(model(small_images), source(small_images))
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    own = next(name for name in files if name.endswith("data.pkl"))
    other = files[own].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert other != files[own] or np.lib.NumpyVersion(np.__version__) < "2.0.0"
    with zipfile.ZipFile(tmp_path / "older.pth", "w") as archive:
        for name, content in {**files, own: other}.items():
            archive.writestr(name, content)
    model, _ = loaded(tmp_path / "older.pth")
    assert torch.equal(model(small_images), source(small_images))


def test_any_first_byte_of_safetensors_is_no_web_page(tmp_path):
    """A file begins with the length of its header: 0x3C20 bytes look like ' <'."""
    state = {key: value.contiguous() for key, value in vit().state_dict().items()}
    file = tmp_path / "w.safetensors"
    for padding in range(0x3C20):
        save_file(state, str(file), metadata={"note": "x" * (0x3C20 - 3000 + padding)})
        if file.read_bytes()[:2] == b" <":
            break
    assert file.read_bytes()[:2] == b" <"
    assert loaded(file)[1] == "32 of 32 tensors"
