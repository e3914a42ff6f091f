"""The export command as users type it."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vit_tucker as vt
from tests.reference import randomise
from vit_tucker.cli import main

pytestmark = pytest.mark.slow

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 10, "in_chans": 1}
PT2 = ("--format", "torch_export")
TIMM_TELLS = hasattr(timm.models, "get_model_args")


def make(folder, config, **sizes):
    """A folder like a run's, with a small patched model of digits."""
    sizes = {**SMALL, **sizes}
    model = randomise(timm.create_model("vit_tiny_patch16_224", **sizes)).eval()
    vt.patch(model, config)
    randomise(model, 5)
    vt.save(
        model,
        folder / "checkpoints" / "best",
        data={"mean": (0.3,), "std": (0.4,)},
        label_names=list("0123456789"),
        model_args=None if TIMM_TELLS else sizes,
    )
    (folder / "config.yaml").write_text("model: {name: vit_tiny_patch16_224}\ndata: {dataset: digits}\n")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing is written into."""
    return make(tmp_path_factory.mktemp("finished") / "run", vt.TuckerConfig(ranks=(3, 8, 8)))


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def export(capsys, *arguments):
    """Exit status and what was said."""
    capsys.readouterr()
    try:
        status = main(["export", *map(str, arguments)])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out, said.err


def test_onnx_and_int8_on_the_runs_own_images(tmp_path, capsys):
    """Four times smaller weights; the logits move, and little.

    The file in onnxruntime gives the model's own logits for an image that it is handed as its metadata says.
    """
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = make(tmp_path / "run", vt.TuckerConfig(ranks=(3, 9, 8)), embed_dim=192)
    status, out, err = export(capsys, run, "--int8", "--images", 40, "--json")
    assert (status, err) == (0, "")
    values = json.loads(out)
    file = run / "model.int8.onnx"
    assert values["file"] == str(file)
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", file.name]
    before, after = values["stages"]
    assert (before["label"], after["label"]) == ("float32", "int8")
    assert before["random"]["relative_error"] < 1e-4
    assert after["bytes"] == file.stat().st_size < 0.45 * before["bytes"]
    whole, small = before["real"], after["real"]
    assert (whole["images"], whole["labelled"], whole["agreements"]) == (40, 40, 40)
    assert (small["images"], small["labelled"]) == (40, 40)
    assert whole["accuracy_file"] == whole["accuracy_model"] is not None
    assert whole["relative_error"] < 1e-4 < small["relative_error"] < 0.1
    operations = [node.op_type for node in onnx.load(str(file)).graph.node]
    # query, key and value as one; T, S^T and output; MLP; head
    assert operations.count("MatMulInteger") == values["int8_products"] == 7
    assert "Conv" in operations
    assert "ConvInteger" not in operations
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["label_names"]) == list("0123456789")
    assert told["quantisation"] == "int8 dynamic"
    image = torch.rand(2, 1, 16, 16)
    mean, std = (json.loads(told[name])[0] for name in ("mean", "std"))
    (logits,) = session.run(["logits"], {"image": ((image - mean) / std).numpy()})
    expected = vt.load(run)((image - 0.3) / 0.4).detach().numpy()
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_a_table_for_people_and_image_files(finished, tmp_path, capsys):
    for number in range(5):
        (tmp_path / "photos" / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (50 * number, 90, 120)).save(tmp_path / "photos" / "deep" / f"{number}.png")
    out = tmp_path / "new" / "model.pt2"
    status, said, err = export(capsys, finished, *PT2, "--data", tmp_path / "photos", "--out", out, "--images", 4)
    assert (status, err) == (0, "")
    lines = said.splitlines()
    assert lines[0].startswith(f"{out}: 0.")
    assert [cell.strip() for cell in lines[5].split("|")][1:4] == ["float32", "images", "4"]
    assert "top-1" in lines[2]
    assert out.is_file()


def test_dense_folders_need_timm_alone(run, capsys):
    status, said, err = export(capsys, run, "--format", "dense", "--images", 32)
    assert (status, err) == (0, "")
    assert "plain attention in 1 layers, equal to the model's" in said
    config = json.loads((run / "dense" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["label_names"] == list("0123456789")
    assert sorted(p.name for p in (run / "dense").iterdir()) == ["config.json", "model.safetensors"]
    if TIMM_TELLS:
        plain = timm.create_model(f"local-dir:{run / 'dense'}", pretrained=True).eval()
        x = torch.randn(3, 1, 16, 16)
        torch.testing.assert_close(plain(x), vt.load(run)(x), rtol=1e-4, atol=1e-4)
    status, _, err = export(capsys, run, "--format", "dense")
    assert status == 2
    assert "the folder is not empty; name a new one" in err


@pytest.mark.skipif(not TIMM_TELLS, reason="this timm's ViTs take their own size to be another path")
def test_trained_models_take_any_size_afterwards(run, capsys):
    status, said, err = export(capsys, run, *PT2, "--dynamic-img-size", "--data", "none", "--json")
    assert (status, err) == (0, "")
    program = torch.export.load(json.loads(said)["file"]).module()
    for size in ((16, 16), (24, 40)):
        assert program(torch.randn(3, 1, *size)).shape == (3, 10)


def test_what_does_not_fit_is_cut_only_on_request(tmp_path, capsys):
    wide = make(tmp_path / "wide", vt.TuckerConfig(ranks=(3, 12, 11)))
    status, _, err = export(capsys, wide, *PT2, "--dense", "--data", "none")
    assert status == 2
    assert "blocks.0.attn: the pre-softmax matrix of head 0 has rank 11, dense heads have at most 8" in err
    options = ("--dense", "--approximate", "--data", "none")
    status, said, _ = export(capsys, wide, *PT2, *options)
    assert status == 0
    assert "blocks.0.attn: cut to plain attention, which loses " in said
    assert "compared on noise only" in said
    assert (wide / "model.dense.pt2").is_file()


def test_a_file_that_is_off_is_not_left(run, capsys):
    status, _, err = export(capsys, run, "--format", "dense", "--data", "none", "--tolerance", 1e-9)
    assert status == 1
    assert err.startswith("error: on random images the file's outputs are off by ")
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onxx"], "unknown format 'onxx': one of onnx, torch_export, dense; did you mean 'onnx'?"),
        (["--format", "torchscript"], "torchscript is not written: torch has deprecated it; torch_export (.pt2)"),
        ([*PT2, "--int8"], "int8 is an option of onnx"),
        (["--format", "dense", "--dynamic-img-size"], "--dynamic-img-size is no option of --format dense"),
        (["--approximate"], "--approximate is an option of --dense and of --format dense"),
        ([*PT2, "--images", "0"], "0: must be at least 1"),
        ([*PT2, "--tolerance", "0"], "--tolerance 0.0: must be above 0"),
        ([*PT2, "--data", "digit"], "digit"),
        ([*PT2, "--data", "none", "data.root=x"], "data.root=x: there are no data with --data none"),
        ([*PT2, "data.rot=x"], "did you mean 'root'?"),
        ([*PT2, "train.epochs=1"], "only keys of the data section"),
        ([*PT2, "data.dataset=imagenet", "data.root=nowhere"], "--data names other images, --data none does without"),
        ([*PT2, "--out", "RUN"], "is a folder; name a file"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, message, finished, capsys):
    status, _, err = export(capsys, finished, *[str(finished) if part == "RUN" else part for part in arguments])
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(p.name for p in finished.iterdir()) == ["checkpoints", "config.yaml"]


def test_models_and_images_that_are_not_there(finished, tmp_path, capsys):
    status, _, err = export(capsys, tmp_path / "nothing")
    assert status == 2
    assert "no such folder" in err
    (tmp_path / "empty").mkdir()
    status, _, err = export(capsys, finished, *PT2, "--data", tmp_path / "empty")
    assert status == 2
    assert "the folder has no images" in err
    (tmp_path / "a.png").write_text("no image")
    status, _, err = export(capsys, finished, *PT2, "--data", tmp_path / "a.png")
    assert status == 2
    assert "a.png: can't be read as an image" in err
