"""Every command with good input, for people and for machines, and with bad input: one line, status 2, nothing written."""

import argparse
import csv
import io
import json
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import vit_tucker as vt
from vit_tucker.cli import build_parser, main
from vit_tucker.data.datasets import load_digits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]
TINY = ["model.depth=1", "model.img_size=32", "model.embed_dim=48", "model.num_heads=4"]
METHOD = ["--method", "tucker ranks=[2,8,8]"]


@pytest.fixture
def command(capfd):
    """Run a command; returns what it printed on standard output."""

    def run(*arguments: str | Path, status: int = 0) -> str:
        found = main([str(text) for text in arguments])
        out, err = capfd.readouterr()
        assert found == status, err
        return out

    return run


@pytest.fixture
def refusal(capfd):
    """Run a command that must fail with status 2; returns the one line that it printed."""

    def run(*arguments: str | Path, status: int = 2) -> str:
        assert main([str(text) for text in arguments]) == status
        out, err = capfd.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        assert err.startswith("error: ")
        return err

    return run


@pytest.fixture
def pictures():
    """The first digits of the test set as files, and their labels."""
    Path("pictures/more").mkdir(parents=True)
    labels = {}
    for number, (image, label) in enumerate(load_digits(train=False, mode="L")):
        if number == 8:
            break
        file = Path("pictures") / ("more" if number % 2 else "") / f"{number}.png"
        image.save(file)
        labels[str(file)] = label
    return labels


def names_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))


class TestAll:
    def test_every_command_has_help_and_says_what_it_takes(self, command):
        commands = names_of(build_parser())
        shown = command("--help")
        for name, parser in commands.items():
            assert f" {name} " in shown or f" {name}\n" in shown
            text = command(name, "--help")
            assert "usage: " in text
            for action in parser._actions:
                assert action.help or isinstance(action, argparse._HelpAction) or action.choices, (name, action.dest)

    def test_results_can_be_had_as_json_from_all_that_have_some(self):
        without = {"train", "sweep", "report", "schema", "completion"}  # files and logs, or JSON already, or a script
        for name, parser in names_of(build_parser()).items():
            flags = {flag for action in parser._actions for flag in action.option_strings}
            assert ("--json" in flags) == (name not in without), name

    def test_one_flag_has_one_meaning(self):
        """The same metavar and type wherever a flag of that name is."""
        seen: dict[str, tuple] = {}
        for parser in names_of(build_parser()).values():
            for action in parser._actions:
                for flag in action.option_strings:
                    if flag in (
                        "--batch-size",
                        "--device",
                        "--precision",
                        "--json",
                        "--cfg",
                        "--num-workers",
                        "--turns",
                    ):
                        kind = (type(action).__name__, action.metavar if flag != "--cfg" else None)
                        assert seen.setdefault(flag, kind) == kind, flag

    def test_wrong_words_are_one_line_with_the_nearest_right_one(self, refusal):
        assert "did you mean 'evaluate'?" in refusal("evalute")
        assert "did you mean '--json'?" in refusal("evaluate", "x", "--jsn")
        assert "did you mean 'bf16'?" in refusal("evaluate", "x", "--precision", "bf61")
        assert "required: COMMAND" in refusal()

    def test_the_version_is_the_packages(self, command):
        assert command("--version") == f"vit_tucker {vt.__version__}\n"

    def test_a_completion_script_knows_commands_and_flags(self, command):
        Path("experiments/configs").mkdir(parents=True)
        Path("experiments/configs/$(touch x).yaml").touch()
        Path("complete.sh").write_text(command("completion", "bash"))
        done = subprocess.run(
            ["bash", "-c", "source ./complete.sh; complete -p vit-tucker; COMP_WORDS=(vit-tucker eval); COMP_CWORD=1; "
             "_shtab_vit_tucker; echo ${COMPREPLY[@]}; COMP_WORDS=(vit-tucker evaluate --pre); COMP_CWORD=2; COMPREPLY=(); "
             "_shtab_vit_tucker; echo ${COMPREPLY[@]}; COMP_WORDS=(vit-tucker plan --cfg digits/m); COMP_CWORD=3; COMPREPLY=(); "
             "_shtab_vit_tucker; echo ${COMPREPLY[@]}; COMP_WORDS=(vit-tucker sweep --cfg sweeps/a); COMPREPLY=(); "
             "_shtab_vit_tucker; echo ${COMPREPLY[@]}"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        names = ["digits/mla16 digits/mqa", "sweeps/ablations_digits"]
        assert done.stdout.splitlines()[1:] == ["evaluate", "--precision", *names]
        assert not Path("x").exists()
        zsh = command("completion", "zsh")
        assert "#compdef vit-tucker" in zsh
        assert " cifar10/mqa_in21k " in zsh

    def test_a_shell_without_a_script_is_refused(self, refusal):
        assert "did you mean 'bash'?" in refusal("completion", "bsh")


class TestPlanAndConvert:
    def test_a_plan_of_a_model_is_that_of_its_config(self, command):
        printed = command("plan", "vit_tiny_patch16_224", *METHOD, *TINY)
        assert "blocks.0.attn" in printed
        assert "plan only" in printed
        values = json.loads(command("plan", "vit_tiny_patch16_224", *METHOD, *TINY, "--json"))
        assert values["layers"][0]["options"] == "ranks=2,8,8"

    def test_alike_layers_share_a_row_unless_each_is_asked_for(self, command):
        deep = ["plan", "vit_tiny_patch16_224", *METHOD, *TINY, "model.depth=3"]
        assert "blocks.0-2.attn" in command(*deep)
        assert "blocks.1.attn" in command(*deep, "--each-layer")
        assert len(json.loads(command(*deep, "--json"))["layers"]) == 3
        assert "look freshly initialised" in command(*deep)  # of random weights

    def test_converted_models_are_folders_that_rebuild_themselves(self, command):
        torch.manual_seed(0)
        values = json.loads(
            command("convert", "vit_tiny_patch16_224", *METHOD, *TINY, "model.num_classes=3", "--out", "a", "--json")
        )
        assert values["folder"] == "a"
        assert 0 < values["layers"][0]["pre_error"] < 1
        model = vt.load("a")
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        assert "no trained weights" in command("convert", "vit_tiny_patch16_224", *METHOD, *TINY, "--out", "b")
        vt.save(vt.load("a").train(), "c")

    def test_conversion_sees_images_and_weights(self, command, dense_folder):
        start = ["--cfg", dense_folder, f"model.checkpoint={dense_folder}", *METHOD]
        plain = json.loads(command("convert", *start, "--out", "a", "--json"))
        assert list(vt.load("a").pretrained_cfg["label_names"]) == list("0123456789")  # of the run that it started from
        aware = json.loads(command("convert", *start, "--data", "digits", "--images", "64", "--out", "b", "--json"))
        assert plain["layers"][0]["output_error"] is None
        assert 0 < aware["layers"][0]["output_error"] < 1
        by_weights, by_images = (
            json.loads(command("evaluate", folder, "--data", "digits", "--json"))["top1"] for folder in "ab"
        )
        assert by_images > by_weights - 5  # a model of two short epochs: no more than a hint that images don't harm

    def test_mistakes(self, refusal):
        out = ["--out", "new"]
        model = ["convert", "vit_tiny_patch16_224", *TINY, *out]
        assert "name a method" in refusal(*model)
        assert "did you mean 'tucker'" in refusal(*model, "--method", "tuker ranks=[2,8,8]")
        assert "head rank 9" in refusal(*model, "--method", "tucker ranks=[9,8,8]")
        assert "did you mean 'vit_tiny_patch16_224'" in refusal("convert", "vit_tiny_patch16_225", *METHOD, *out)
        assert "did you mean 'digits'" in refusal(*model, *METHOD, "--data", "digit")
        assert "needs one of MODEL and --cfg" in refusal("plan", *METHOD)
        assert "--device cup: one of cpu, cuda, mps, xpu; did you mean 'cpu'?" in refusal(
            *model, *METHOD, "--device", "cup"
        )
        assert "not 2 models" in refusal("plan", "a", "b", *METHOD)
        assert "must be at least 1" in refusal(*model, *METHOD, "--images", "0")
        Path("file").touch()
        assert "is a file" in refusal(*model[:-2], "--out", "file", *METHOD)
        assert not Path("new").exists()


class TestEvaluate:
    def test_a_run_brings_its_data(self, command, run_folder):
        results = json.loads((run_folder / "results.json").read_text())
        values = json.loads(command("evaluate", run_folder, "--json"))
        assert values["top1"] == pytest.approx(results["best"]["top1"])
        assert values["count"] == 360
        assert values["dataset"] == "digits"
        last = json.loads(command("evaluate", run_folder / "checkpoints/last", "--json", "--batch-size", "50"))
        assert last["top1"] == pytest.approx(results["last"]["eval_top1"])
        assert last["loss"] == pytest.approx(results["last"]["eval_loss"], rel=1e-5)
        on_train = json.loads(command("evaluate", run_folder, "--json", "data.val_split=train"))
        assert on_train["count"] == 1437
        assert f"{run_folder} on digits: top-1 {values['top1']:.2f}%" in command("evaluate", run_folder)

    def test_mistakes(self, refusal, run_folder):
        assert "no such folder" in refusal("evaluate", "nowhere")
        assert "100" in refusal("evaluate", run_folder, "--data", "cifar100")
        assert "only keys of the data section" in refusal("evaluate", run_folder, "train.epochs=3")
        assert "did you mean 'root'" in refusal("evaluate", run_folder, "data.rot=3")
        vt.save(vt.load(run_folder), "bare")
        assert "name one by --data" in refusal("evaluate", "bare")


class TestPredict:
    def test_files_and_folders_with_names(self, command, run_folder, pictures):
        out = json.loads(command("predict", run_folder, "pictures", "--json"))
        assert [entry["file"] for entry in out] == sorted(pictures)
        model = vt.load(run_folder)
        transform = create_transform(**resolve_data_config({}, model=model))
        for entry in out:
            assert len(entry["top"]) == 5
            chances = [guess["probability"] for guess in entry["top"]]
            assert chances == sorted(chances, reverse=True)
            assert all(guess["label"] == str(guess["index"]) for guess in entry["top"])
            expected = model(transform(Image.open(entry["file"]))[None]).softmax(1)[0]
            assert entry["top"][0]["index"] == expected.argmax().item()
            assert chances[0] == pytest.approx(expected.max().item(), rel=1e-4)  # float32

    def test_a_table_a_csv_file_and_other_options(self, command, run_folder, pictures):
        first = next(iter(pictures))
        printed = command("predict", run_folder, first, "--top-k", "2")
        assert printed.startswith(first)
        assert printed.count("%") == 2
        assert command(
            "predict", run_folder, "pictures", "--out", "sub/p.csv", "--batch-size", "3", "--num-workers", "1"
        ) == ("sub/p.csv: written\n")
        rows = list(csv.DictReader(io.StringIO(Path("sub/p.csv").read_text())))
        assert [row["file"] for row in rows] == sorted(pictures)
        assert list(rows[0])[:4] == ["file", "index1", "label1", "probability1"]
        assert len(rows[0]) == 16

    def test_unreadable_files_are_named_and_the_others_done(self, capfd, run_folder, pictures):
        Path("pictures/bad.png").write_text("no image")
        assert main(["predict", str(run_folder), "pictures", "--json"]) == 1
        out, err = capfd.readouterr()
        assert err.splitlines() == ["error: pictures/bad.png: can't be read as an image: cannot identify image file"]
        assert len(json.loads(out)) == len(pictures)

    def test_mistakes(self, refusal, run_folder, pictures):
        assert "none.png: no such file or folder" in refusal("predict", run_folder, "none.png")
        Path("empty").mkdir()
        assert "empty: the folder has no images" in refusal("predict", run_folder, "empty")
        assert "no such folder" in refusal("predict", "nowhere", "pictures")
        assert "must be at least 1" in refusal("predict", run_folder, "pictures", "--top-k", "0")
        assert "one of cpu, cuda" in refusal("predict", run_folder, "pictures", "--device", "gpu")
        assert "is a folder" in refusal("predict", run_folder, "pictures", "--out", "empty")
        vt.save(vt.load(run_folder, num_classes=0), "headless")
        assert "no classifier" in refusal("predict", "headless", "pictures")
        assert "no classifier" in refusal("evaluate", "headless", "--data", "digits")


class TestBench:
    def test_models_and_methods_side_by_side(self, command, run_folder):
        options = ["--turns", "2", "--batch-size", "2", "--img-size", "32", "--device", "cpu"]
        rows = json.loads(command("bench", "test_vit", *METHOD, *options, "--json"))
        assert [row["model"] for row in rows] == ["test_vit", "test_vit tucker ranks=[2,8,8]"]
        dense, tucker = rows
        assert dense["infer_speedup"] == 1
        assert tucker["attention_params"] < dense["attention_params"]
        assert tucker["infer_gmacs"] < dense["infer_gmacs"]
        for row in rows:
            assert row["infer_samples_per_sec"] == pytest.approx(2e3 / row["infer_step_time"], rel=1e-2)
            assert row["infer_img_size"] == 32
        small = ["--turns", "2", "--batch-size", "2", "--device", "cpu", "--train"]
        printed = command("bench", run_folder, *small)
        assert "train images/s" in printed
        assert "1.00x" in printed
        command("bench", run_folder, *small, "--out", "b.csv")
        assert "train_step_time" in Path("b.csv").read_text().splitlines()[0]

    def test_mistakes(self, refusal, run_folder):
        assert "did you mean" in refusal("bench", "vit_tiny_patch16_225")
        assert "the models accept different images" in refusal("bench", run_folder, "vit_tiny_patch16_224")
        assert "have their attention already" in refusal("bench", run_folder, *METHOD)
        assert "must be at least 2" in refusal("bench", run_folder, "--turns", "1")


class TestOthers:
    def test_lists(self, command, refusal):
        assert command("methods").split() == json.loads(command("methods", "--json")) == vt.list_methods()
        assert "properties" in json.loads(command("schema", "--sweep"))
        assert "unrecognized arguments: --x" in refusal("schema", "--x")
        assert "unrecognized arguments: x" in refusal("methods", "x")

    def test_compare(self, command, refusal, run_folder):
        row = json.loads(command("compare", run_folder, "--json"))[0]
        assert row["attention"] == "tucker ranks=3,8,8"
        assert f"{row['attention_params']:,}" in command("compare", run_folder)
        assert "no results.json" in refusal("compare", "nowhere")

    def test_tables_and_report(self, command, refusal, run_folder):
        values = json.loads(command("tables", run_folder, "--out", "kept/study", "--json"))
        assert values["sections"][0]["runs"] == 1
        assert Path(values["tables"]).is_file()
        assert "tables in kept/study/tables.md" in command("tables", "kept/study")
        assert "kept/README.md" in command("report", "kept")
        assert "no such file or folder" in refusal("tables", "nowhere", "--out", "x")
        assert "name a folder for the tables" in refusal("tables", run_folder, run_folder)
        assert "nowhere" in refusal("report", "nowhere")
        assert not Path("x").exists()

    def test_ranks_as_values(self, command, refusal):
        values = json.loads(command("ranks", "vit_tiny_patch16_224", "--random", *TINY, "--out", "r", "--json"))
        assert {row["mode"] for row in values["ranks"]} == {"head", "query", "key", "output", "value"}
        assert isinstance(values["ranks"][0]["effective_rank"], float)
        assert "must be at least 1" in refusal("ranks", "vit_tiny_patch16_224", "--images", "0")

    def test_cost_and_hosts_as_json(self, command, refusal):
        values = json.loads(command("cost", "vit_tiny_patch16_224", *METHOD, *TINY, "--json"))
        assert [row["attention"] for row in values["rows"]] == ["dense", METHOD[1]]
        command("cost", "--table", "1", "--out", "t.json")
        assert json.loads(Path("t.json").read_text())["rows"]
        assert json.loads(command("hosts", "--filter", "vit_tiny_patch16_224", "--json"))[0]["methods"]
        assert "no timm model matches" in refusal("hosts", "--filter", "vit_teeny")

    def test_sweep_and_train_are_the_scripts(self, command, refusal):
        assert "digits" in command("train", "--cfg", "digits/dense", "--dry-run", "model.depth=1")
        assert "no such config" in refusal("train", "--cfg", "digits/dens")
        assert "no such config" in refusal("sweep", "--cfg", "nothing")
        assert "mha" in command("sweep", "--cfg", "sweeps/fig3_digits", "--dry-run", "--only", "mha", "--seeds", "0")

    def test_push_says_why_not(self, refusal, run_folder, monkeypatch):
        assert "written OWNER/NAME" in refusal("push", run_folder, "name")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "me/x: not uploaded: HF_HUB_OFFLINE is set" in refusal("push", run_folder, "me/x", status=1)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("https_proxy", "http://proxy.example")  # so that nobody asks for the hub itself
        monkeypatch.setattr("vit_tucker.checkpoint.save.push_to_hf_hub", _offline)
        assert "me/x: not uploaded: ConnectionError: no way" in refusal("push", run_folder, "me/x", status=1)
        assert "no such folder" in refusal("push", "nowhere", "me/x")


def _offline(*_, **__):
    raise ConnectionError("no way\nmore lines")
