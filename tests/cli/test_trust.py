"""A run folder from elsewhere is data: no command runs the Python that its config names, unless the user says so."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image

import vit_tucker as vt
from tests.conftest import process_environment
from vit_tucker.attention import registry
from vit_tucker.cli import main, train_main
from vit_tucker.cli.sweep import sweep_main
from vit_tucker.config.load import load_config
from vit_tucker.config.plugins import command_plugins, load_plugins, trust_plugins
from vit_tucker.inference.predict import classes_for, open_model, run_config

pytestmark = pytest.mark.slow

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "in_chans": 1, "num_classes": 10}
HOST = "vit_tiny_patch16_224"
MARKER = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
REFUSED = "is data, whose plug-ins run only if you allow it: --trust-plugins, or -p FILE for your own copy"


@pytest.fixture(autouse=True)
def nothing_named() -> Iterator[None]:
    """A process in which no plug-in has been named yet."""
    with command_plugins([], False):
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with weights, as somebody else's machine has written it, and a plug-in inside."""
    folder = tmp_path_factory.mktemp("trust") / "run"
    model = timm.create_model(HOST, **SIZES)
    vt.patch(model, vt.GQAConfig(num_kv_heads=1))
    vt.save(model, folder / "checkpoints" / "best", model_args=SIZES)
    (folder / "evil.py").write_text(MARKER)
    values = {
        "plugins": ["evil.py"],
        "model": {"name": HOST, **SIZES},
        "attention": {"method": "gqa", "num_kv_heads": 1},
        "data": {"num_workers": 0},
        "train": {"epochs": 1, "warmup_epochs": 0, "cpu": True},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def run(template: Path, in_tmp: Path) -> Path:
    """A copy of it in the current folder, with the user's own files beside it."""
    shutil.copytree(template, "run")
    Image.new("L", (8, 8)).save("photo.png")
    Path("mine.yaml").write_text("base: run/config.yaml\n")
    Path("over.yaml").write_text("base: run\ntrain: {epochs: 2}\n")
    Path("cells.yaml").write_text(
        "base: run\nstart: null\ncells: [{name: gqa, attention: {method: gqa, num_kv_heads: 1}}]\n"
    )
    model = timm.create_model(HOST, **SIZES)
    vt.save(model, "plain", model_args=SIZES)
    return in_tmp / "run"


COMMANDS = {
    "plan": "plan --cfg run",
    "plan of the file": "plan --cfg run/config.yaml",
    "plan by a detour": "plan --cfg plain/../run/config.yaml",
    "plan of a base": "plan --cfg mine.yaml",
    "plan of a folder as base": "plan --cfg over.yaml",
    "cost": "cost --cfg run",
    "convert": "convert --cfg run --out out",
    "train": "train --cfg run --dry-run",
    "train into it": "train --cfg mine.yaml output_dir=run --dry-run",
    "sweep": "sweep --cfg cells.yaml --dry-run",
    "evaluate": "evaluate run",
    "evaluate a checkpoint": "evaluate run/checkpoints/best",
    "predict": "predict run photo.png",
    "predict from inside": "predict run/checkpoints/best photo.png",
    "explain": "explain run photo.png --dense none --out out",
    "explain beside it": "explain plain photo.png --dense run --out out",
    "export": "export run --format dense --approximate --data none --out out",
    "bench": "bench run --turns 2 --batch-size 1",
    "push": "push run owner/name",
}
"""By what they show; each opens the folder."""
FAILING = {"push": 1, "train into it": 2, "plan of a folder as base": 0}
"""Exit statuses with trust that are not 0: there is no network here, and the folder holds a run of another config."""
NEVER = {
    "ranks": f"ranks {HOST} --checkpoint run",
    "compare": "compare run",
    "tables": "tables run --out out",
}
"""Commands that have no use for plug-ins."""


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_folder_runs_nothing(run, command, capfd):
    before = sorted(Path().rglob("*"))
    assert main(command.split()) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    assert "run/evil.py" in error
    assert REFUSED in error
    assert sorted(Path().rglob("*")) == before  # neither the marker nor anything else


@pytest.mark.parametrize("name", COMMANDS)
def test_a_trusted_folder_runs_its_plug_in(run, name, capfd):
    status = main([*COMMANDS[name].split(), "--trust-plugins"])
    assert (run / "evil.ran").is_file()
    assert status == FAILING.get(name, 0), capfd.readouterr().err


@pytest.mark.parametrize("command", NEVER.values(), ids=NEVER)
def test_commands_without_plug_ins(run, command, capfd):
    assert main(command.split()) == 2  # the weights are not dense, the run is not finished
    assert REFUSED not in capfd.readouterr().err
    assert not (run / "evil.ran").exists()


def test_the_scripts_heed_it_too(run, capfd):
    assert train_main(["--cfg", "run", "--dry-run"]) == 2
    assert sweep_main(["--cfg", "cells.yaml", "--dry-run"]) == 2
    assert capfd.readouterr().err.count(REFUSED) == 2
    assert not (run / "evil.ran").exists()
    assert train_main(["--cfg", "run", "--dry-run", "--trust-plugins"]) == 0
    assert (run / "evil.ran").is_file()


def test_python_has_the_same_rule(run):
    model = vt.load("run")  # reads no plug-ins
    openers: list[Callable[[], object]] = [
        lambda: open_model("run"),
        lambda: run_config("run"),
        lambda: load_config("run"),
        lambda: load_config(run / "config.yaml"),
        lambda: classes_for(model, "run", load_config("digits/dense").data),
    ]
    for opener in openers:
        with pytest.raises(vt.ConfigError, match=REFUSED):
            opener()
    assert not (run / "evil.ran").exists()
    with trust_plugins():
        open_model("run")
    assert (run / "evil.ran").is_file()


def test_a_file_of_the_users_own_stands_for_the_folders(run, capfd):
    """-p names what runs: it, and not the folder's file of the same name."""
    Path("evil.py").write_text(MARKER)
    assert main(["plan", "--cfg", "run", "-p", "evil.py"]) == 0
    assert (run.parent / "evil.ran").is_file()
    assert not (run / "evil.ran").exists()
    Path("other.py").write_text(MARKER)
    assert (
        main(["plan", "--cfg", "run", "-p", "other.py"]) == 2
    )  # names nothing of the folder's; and the last -p is forgotten
    assert main(["plan", "--cfg", "run", "-p", "gone.py"]) == 2
    assert "plugins: gone.py: no such file" in capfd.readouterr().err
    assert main(["plan", "--cfg", "run", "plugins=[evil.py]"]) == 0  # an override is the user's word too
    assert not (run / "evil.ran").exists()


@pytest.fixture
def own_method() -> Iterator[None]:
    """Takes the method 'trusted' out of the registry again."""
    yield
    registry.METHODS.entries.pop("trusted", None)


@pytest.mark.usefixtures("own_method")
def test_ones_own_run_goes_on_without_a_word(in_tmp, capfd):
    """Trained, continued and evaluated by the config that names the plug-in; by the folder alone it needs the user's word."""
    Path("method.py").write_text(
        "from typing import Literal\nimport vit_tucker\nfrom vit_tucker.attention.variants.gqa import GQAConfig\n\n"
        '@vit_tucker.register_method("trusted")\nclass Config(GQAConfig):\n    method: Literal["trusted"] = "trusted"\n'
    )
    attention = "attention: {method: trusted, num_kv_heads: 1, init: random}"
    values = f"model: {json.dumps({'name': HOST, **SIZES})}\n{attention}\ntrain: {{epochs: 1, warmup_epochs: 0, cpu: true}}\n"
    Path("mine.yaml").write_text(f"plugins: [method.py]\n{values}data: {{num_workers: 0, num_samples: 128}}\n")
    assert train_main(["--cfg", "mine.yaml"]) == 0
    assert train_main(["--cfg", "mine.yaml", "train.epochs=2", "--allow-changes"]) == 0
    capfd.readouterr()
    assert train_main(["--cfg", "runs/mine-0"]) == 2
    assert "runs/mine-0/config.yaml:4: plugins: method.py is not run" in capfd.readouterr().err
    assert train_main(["--cfg", "runs/mine-0", "-p", "method.py"]) == 0
    shutil.move("mine.yaml", "runs/mine-0/mine.yaml")  # now it lies inside
    assert train_main(["--cfg", "runs/mine-0/mine.yaml"]) == 2
    load_plugins(["method.py"])
    open_model("runs/mine-0")


def test_python_m_imports_nothing_from_a_folder_that_is_read(in_tmp):
    """``python -m`` has the current folder on its path; where that is a run, a module in it stands for no other."""
    Path("argparse.py").write_text("raise SystemExit('from the current folder')\n")
    command = [sys.executable, "-m", "vit_tucker", "--version"]
    environment = process_environment(Path(vt.__file__).parents[1])
    said = []
    for files in ((), ("config.yaml", "train.log")):
        for name in files:
            Path(name).touch()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        said.append(done.stdout + done.stderr)
    assert said == ["from the current folder\n", f"vit_tucker {vt.__version__}\n"]
