"""Whose plug-ins run: the user's own; not those that a stored folder's config names, however it is reached."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vit_tucker as vt
from vit_tucker.cli import main
from vit_tucker.config.load import load_config
from vit_tucker.config.plugins import command_plugins, load_plugins, plugin_arguments, trust_plugins
from vit_tucker.config.stored import stored_folder
from vit_tucker.sweep.plan import load_sweep

MODEL = "model: {name: vit_tiny_patch16_224}\n"
MARKER = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
RUN = ("config.yaml", "train.log")
REFUSED = "is not run: .* is data"


@pytest.fixture(autouse=True)
def nothing_named() -> Iterator[None]:
    """A process in which no plug-in has been named yet."""
    with command_plugins([], False):
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder from elsewhere, with a plug-in inside, and the user's folder beside it, which is the current one."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "evil.py").write_text(MARKER)
    write(run)
    return run


def write(run: Path, plugins: str = "evil.py") -> None:
    (run / "config.yaml").write_text(f"{MODEL}plugins: [{plugins}]\n")


def ran(folder: Path) -> list[str]:
    """Names of plug-ins that ran anywhere beside or in a folder; each counts once."""
    found = sorted(folder.parent.rglob("*.ran"))
    for file in found:
        file.unlink()
    sys.modules.pop("vit_tucker_plugin_evil", None)
    return [str(file.relative_to(folder.parent)) for file in found]


@pytest.mark.parametrize(
    "name", ["{0}", "{0}/config.yaml", "../run", "../mine/../run/config.yaml", "link", "link.yaml"]
)
def test_ways_to_name_a_folder(folder, name):
    Path("link").symlink_to(folder)
    Path("link.yaml").symlink_to(folder / "config.yaml")
    with pytest.raises(vt.ConfigError, match=REFUSED):
        load_config(name.format(folder))
    assert ran(folder) == []
    with trust_plugins():
        load_config(name.format(folder))
    assert ran(folder) == ["run/evil.ran"]


@pytest.mark.parametrize(
    "plugin", ["evil.py", "./evil.py", "{0}/evil.py", "../run/evil.py", "evil", "inner.evil", "../mine/mine.py"]
)
def test_ways_to_name_a_plug_in(folder, plugin, monkeypatch):
    """By path or as a module, of the folder or of the user: what a folder chooses does not run."""
    monkeypatch.syspath_prepend(folder)
    (folder / "inner").mkdir()
    for place in (folder / "inner" / "evil.py", folder / "inner" / "__init__.py", Path("mine.py")):
        place.write_text(MARKER)
    write(folder, plugin.format(folder))
    with pytest.raises(vt.ConfigError, match=REFUSED) as caught:
        load_config(folder)
    assert "\n" not in str(caught.value)
    assert ran(folder) == []


def test_bases_are_judged_by_the_way_that_leads_to_them(folder):
    own = folder.parent / "mine"
    (own / "evil.py").write_text(MARKER)
    (own / "names.yaml").write_text(f"{MODEL}plugins: [evil.py]\n")
    (own / "through.yaml").write_text("base: ../run/config.yaml\n")
    (own / "by_folder.yaml").write_text("base: ../run\n")
    (own / "over.yaml").write_text("base: ../run\nplugins: [evil.py]\n")
    (own / "twice.yaml").write_text("base: [../run, names.yaml]\n")
    (own / "last.yaml").write_text("base: [names.yaml, ../run]\n")
    for name in ("names.yaml", "over.yaml", "twice.yaml"):  # the value that counts is the user's
        load_config(name)
        assert ran(folder) == ["mine/evil.ran"], name
    (own / "evil.py").rename(own / "other.py")  # else its name would stand for the folder's
    with command_plugins([], False):
        for name in ("through.yaml", "by_folder.yaml", "last.yaml"):
            with pytest.raises(vt.ConfigError, match=REFUSED):
                load_config(name)
        (folder / "config.yaml").write_text("base: ../mine/names.yaml\n")  # the folder leads to the user's file
        with pytest.raises(vt.ConfigError, match=REFUSED):
            load_config(folder)
        (folder / "config.yaml").unlink()
        (folder / "config.yaml").symlink_to(own / "names.yaml")
        with pytest.raises(vt.ConfigError, match=REFUSED):
            load_config(folder / "config.yaml")
    assert ran(folder) == []


def test_files_inside_a_stored_folder_are_its_own(folder):
    inside = folder / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "x.yaml").write_text(f"{MODEL}plugins: [../../evil.py]\n")
    with command_plugins([], False), pytest.raises(vt.ConfigError, match=REFUSED):
        load_config(inside / "x.yaml")
    assert ran(folder) == []


@pytest.mark.parametrize(
    "files",
    [RUN, ("config.yaml", "results.json"), ("config.json", "model.safetensors"), ("sweep.yaml", "results.jsonl")],
)
def test_signs_of_stored_folders(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
        assert stored_folder(tmp_path / "x.yaml") == (tmp_path if name == files[-1] else None)


def test_sweeps(folder):
    cells = "start: null\ncells: [{name: dense, attention: null}]\n"
    own = folder.parent / "mine" / "cells.yaml"
    with command_plugins([], False):
        for base in (f"base: ../run\n{cells}", f"base: names.yaml\nset: {{plugins: [evil.py]}}\n{cells}"):
            Path("names.yaml").write_text(MODEL)
            own.write_text(base)
            (folder / "sweep.yaml").write_text(base.replace("../run", "config.yaml").replace("names", "../mine/names"))
            with pytest.raises(vt.ConfigError, match=REFUSED):
                load_sweep(folder / "sweep.yaml")
        own.write_text(f"base: ../run\n{cells}")
        with pytest.raises(vt.ConfigError, match=REFUSED):
            load_sweep("cells.yaml")
        own.write_text(f"base: names.yaml\nset: {{plugins: [own.py]}}\n{cells}")
        Path("own.py").write_text(MARKER)
        load_sweep("cells.yaml")
        assert plugin_arguments(["own.py"]) == ["-p", str(Path("own.py").resolve())]  # which its runs are started with
    assert ran(folder) == ["mine/own.ran"]


def test_what_the_user_names_holds_for_one_command(folder):
    own = folder.parent / "mine" / "evil.py"
    own.write_text(MARKER)
    with command_plugins(["evil.py"], False):
        load_config(folder)
        assert plugin_arguments([]) == ["-p", str(own.resolve())]
    assert ran(folder) == ["mine/evil.ran"]
    with command_plugins([], False), pytest.raises(vt.ConfigError, match=REFUSED):
        load_config(folder)


def test_the_current_folder_may_be_the_one_that_is_read(folder, monkeypatch):
    """A user's config does not take a plug-in from there unless it says so."""
    (folder.parent / "mine" / "x.yaml").write_text(f"{MODEL}plugins: [evil.py]\n")
    monkeypatch.chdir(folder)
    with command_plugins([], False), pytest.raises(vt.ConfigError, match="evil.py: no such file"):
        load_config("../mine/x.yaml")
    assert ran(folder) == []
    with command_plugins(["evil.py"], False):
        pass
    assert ran(folder) == ["run/evil.ran"]


def test_the_models_of_this_package_need_no_word(folder):
    write(folder, "experiments/models/vit_c.py")
    (folder / "experiments" / "models").mkdir(parents=True)
    (folder / "experiments" / "models" / "vit_c.py").write_text(MARKER)
    with command_plugins([], False):
        load_config(folder)
        for other in ("experiments/models/../models/vit_c.py", "experiments/vit_c.py", "models/vit_c.py", "vit_c.py"):
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_text(MARKER)
            write(folder, other)
            with command_plugins([], False), pytest.raises(vt.ConfigError, match=REFUSED):
                load_config(folder)
    assert ran(folder) == []


def test_a_plug_in_that_fails_is_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("half.py").write_text("raise OSError('no disk')\n")
    for _ in range(2):
        with pytest.raises(vt.ConfigError, match="plugins: half.py: OSError: no disk"):
            load_plugins(["half.py"])


@pytest.mark.parametrize("command", ["plan vit_tiny_patch16_224 --method half", "cost vit_tiny_patch16_224"])
def test_overrides_name_them_without_a_config_too(folder, command, capfd):
    """By ``plugins=`` or by -p, before the method's name is looked up."""
    Path("evil.py").write_text(MARKER)
    for words in (["plugins=[evil.py]"], ["-p", "evil.py"]):
        main([*command.split(), *words, "model.depth=x"])
        assert "model.depth" in capfd.readouterr().err
        assert ran(folder) == ["mine/evil.ran"]
