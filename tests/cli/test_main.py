"""Command lines as users type them: output, exit status, one line per mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm

from tests.conftest import process_environment
from vit_tucker.attention import registry
from vit_tucker.cli import main, train_main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = ["model.depth=1", "model.embed_dim=32", "train.epochs=1", "train.warmup_epochs=0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", "tuker_r16.yaml"], "error: tuker_r16.yaml: no such config"),
        (["--cfg", "tucker_r16.yaml", "train.epoch=5"], "did you mean 'epochs'?"),
        (
            ["--cfg", "tucker_r16.yaml", "attention.ranks=[9, 8, 8]"],
            "attention: blocks.0.attn: ranks=[9, 8, 8]: head rank 9",
        ),
        (["--cfg", "tucker_r16.yaml", "train.epochs"], "overrides are written key.sub=value"),
        (["--cfg", "tucker_r16.yaml", "--epochs", "5"], "unrecognized arguments: --epochs"),
        ([], "train needs one of MODEL and --cfg"),
        (["vit_tiny_patch16_224", "--cfg", "tucker_r16.yaml"], "not both: 'vit_tiny_patch16_224' beside --cfg tucker"),
        (["vit_tiny_patch16_224"], "train vit_tiny_patch16_224: name a data set, e.g. data.dataset=cifar10"),
        (["vit_tiny_patch16_224", "--method", "tuker", "data.dataset=digits"], "did you mean 'tucker'?"),
        (["vit_tinny_patch16_224", "data.dataset=digits"], "did you mean 'vit_tiny_patch16_224'?"),
        (["vit_tiny_patch16_224", "data.dataset=digitz"], "did you mean 'digits'?"),
        (
            ["--cfg", "tucker_r16.yaml", "--quick-check", "--dry-run"],
            "--quick-check goes without --dry-run: choose one",
        ),
        (["--cfg", "tucker_r16.yaml", "--device", "cpuu"], "training runs on cpu, cuda or cuda:N; did you mean 'cpu'?"),
        (["--cfg", "tucker_r16.yaml", "--device", "cuda:99"], "--device cuda:99: "),
    ],
    ids=str,
)
def test_mistakes_exit_with_2(in_tmp, capfd, arguments, message):
    try:
        status = train_main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capfd.readouterr().err
    assert message in error
    if error.startswith("error:"):
        assert error.count("\n") == 1
    assert not (in_tmp / "runs").exists()


def test_failures_of_the_training_exit_with_1_and_interrupts_with_130(in_tmp, capfd, monkeypatch):
    diverging = ["train.lr=1000", "train.weight_decay=1000", "train.opt=sgd", "train.clip_grad=null"]
    assert train_main(["--cfg", "tucker_r16.yaml", *TINY, *diverging]) == 1
    assert "error: the loss is" in capfd.readouterr().err

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("vit_tucker.run.run.fit", interrupt)
    assert train_main(["--cfg", "tucker_r16.yaml", *TINY, "output_dir=b"]) == 130
    assert "the same command continues" in capfd.readouterr().err


def test_plan_prints_a_table_or_json(in_tmp, capfd):
    small = ["model.pretrained=false", "model.depth=2", "model.embed_dim=192", "model.img_size=32"]
    assert main(["plan", "--cfg", "imagenet/tucker_r16", *small]) == 0
    out = capfd.readouterr().out
    assert "blocks.0-1.attn" in out
    assert "plan only: nothing was changed" in out
    assert main(["plan", "--cfg", "imagenet/gqa2", "--json", *small]) == 0
    assert len(json.loads(capfd.readouterr().out)["layers"]) == 2
    assert main(["plan", "--cfg", "digits/dense"]) == 2
    assert "patches nothing" in capfd.readouterr().err


@pytest.mark.parametrize("command", [["configs"], ["completion", "bash"]], ids=["at the end", "halfway"])
def test_output_may_be_cut_by_its_reader(command):
    """Output that fits into Python's buffer fails when that is flushed, a longer one as it is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "vit_tucker", *command],
        stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=process_environment(), timeout=120,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_small_commands(in_tmp, capfd):
    assert main(["methods"]) == 0
    assert capfd.readouterr().out.split() == ["gqa", "mha", "mla", "tucker"]
    assert main(["schema"]) == 0
    assert json.loads(capfd.readouterr().out)["title"] == "vit_tucker run"
    assert main(["compare", "nowhere"]) == 2
    assert "no results.json" in capfd.readouterr().err
    assert main(["compere"]) == 2


@pytest.fixture
def own_method() -> Iterator[None]:
    """Takes the method 'mine' out of the registry again."""
    yield
    registry.METHODS.entries.pop("mine", None)


@pytest.mark.usefixtures("own_method")
def test_third_party_method_trains_and_goes_on_where_it_is_new(in_tmp, capfd):
    """A user's own method, in a file next to the YAML."""
    (in_tmp / "mine.py").write_text(
        "from typing import Literal\nimport vit_tucker\nfrom vit_tucker.attention.variants.gqa import GQAConfig\n\n"
        '@vit_tucker.register_method("mine")\nclass MineConfig(GQAConfig):\n    method: Literal["mine"] = "mine"\n'
    )
    (in_tmp / "mine.yaml").write_text(
        "base: digits/dense.yaml\nplugins: [mine.py]\nattention: {method: mine, num_kv_heads: 2, init: random}\n"
    )
    assert train_main(["--cfg", "mine.yaml", *TINY, "data.num_samples=256"]) == 0
    printed = capfd.readouterr()
    assert "done: best top-1" in printed.out
    assert "\r" not in printed.err  # no progress bar into a pipe
    results = json.loads((in_tmp / "runs" / "mine-0" / "results.json").read_text())
    assert results["patch"]["layers"][0]["method"] == "mine"
    assert results["environment"]["timm"] == timm.__version__
    del registry.METHODS.entries["mine"], sys.modules["vit_tucker_plugin_mine"]  # as in another process
    assert train_main(["--cfg", "runs/mine-0", "-p", "mine.py"]) == 0
    again = capfd.readouterr().out
    assert "best/model.safetensors: top-1" in again
    assert "epoch 1/1" not in again


DIGITS_VIT = ["model.img_size=16", "model.patch_size=4", "model.embed_dim=32", "model.depth=2", "model.num_heads=4"]


def test_ranks_of_a_model_from_the_command_line(in_tmp, capsys):
    arguments = [
        "ranks",
        "vit_tiny_patch16_224",
        "--random",
        "--data",
        "digits",
        "--images",
        "32",
        "--out",
        "out",
        "--gqa",
        "2",
    ]
    assert main([*arguments, *DIGITS_VIT]) == 0
    printed = capsys.readouterr().out
    assert "| pre | key | 32 |" in printed
    assert "| pre, whitened | key | 32 |" in printed
    names = {file.name for file in (in_tmp / "out").iterdir()}
    assert names == {"layers.csv", "ranks.csv", "singular_values.csv"} | {
        f"spectra{kind}.{suffix}" for kind in ("", "_whitened") for suffix in ("png", "pdf")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_tinny_patch16_224", "--random"], "did you mean 'vit_tiny_patch16_224'?"),
        (["vit_tiny_patch16_224", "--checkpoint", "missing.pth"], "missing.pth: no such file or run folder"),
        (["vit_tiny_patch16_224", "--random", "model.dept=2"], "did you mean 'depth'?"),
        (["vit_tiny_patch16_224", "--random", "--data", "digit"], "did you mean 'digits'?"),
        (["resnet18", "--random"], "no attention module that vit_tucker can read"),
        (["vit_tiny_patch16_224", "--random", "--dta", "digits"], "unrecognized arguments: --dta"),
    ],
    ids=str,
)
def test_mistakes_in_ranks_exit_with_2(in_tmp, capfd, arguments, message):
    try:
        status = main(["ranks", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (in_tmp / "runs").exists()


def test_options_of_a_method_beside_it(in_tmp, capfd):
    """Keys of the command line are over --method, also where the config has another one."""
    for target in (["vit_tiny_patch16_224", "data.dataset=digits", *TINY, "model.img_size=16", "model.patch_size=4"],
                   ["--cfg", "digits/tucker_r16", *TINY]):  # fmt: skip
        arguments = [
            *target,
            "--method",
            "gqa num_kv_heads=1",
            "attention.layers='0'",
            "model.num_heads=4",
            "--dry-run",
        ]
        assert train_main(arguments) == 0
        out = capfd.readouterr().out
        assert "num_kv_heads=1" in out
        assert "-gqa-num_kv_heads-1-0" in out  # the folder
    assert not list(in_tmp.iterdir())
