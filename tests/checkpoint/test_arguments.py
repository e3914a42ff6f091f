"""A folder's config.json chooses sizes of a model, and nothing else: no file, address or code, whatever timm there is."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vit_tucker as vt
from vit_tucker.checkpoint.arguments import allowed_names, own_arguments
from vit_tucker.checkpoint.host_model import create_host
from vit_tucker.config.schema import ModelConfig
from vit_tucker.storage.digests import digest_of

HOST = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}


class Evil:
    """A pickle that creates a folder as it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Is there if something was executed; evil.pth beside it would make it."""
    torch.save({"state_dict": Evil(tmp_path / "marker")}, tmp_path / "evil.pth")
    return tmp_path / "marker"


@cache
def small(patched: bool) -> nn.Module:
    """Returns the model of ``saved``."""
    model = timm.create_model(HOST, **SMALL).eval()
    if patched:
        vt.patch(model, vt.GQAConfig(num_kv_heads=1))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Where the patched and the dense model are saved."""
    place = tmp_path_factory.mktemp("folders")
    return {patched: vt.save(small(patched), place / str(patched), model_args=SMALL) for patched in (True, False)}


@pytest.fixture
def saved(folders: dict[bool, Path], tmp_path: Path) -> Callable[..., nn.Module]:
    """Puts a saved model into the folder m, and returns it."""

    def copied(patched: bool = True) -> nn.Module:
        shutil.copytree(folders[patched], tmp_path / "m")
        return small(patched)

    return copied


def edit(folder: Path, section: str, **values: object) -> None:
    """Changes entries of config.json, with digests that fit: who writes one writes the other."""
    config = json.loads((folder / "config.json").read_text())
    config[section].update(values)
    config["vit_tucker"]["stored"]["config"] = digest_of(config)
    (folder / "config.json").write_text(json.dumps(config))


def has_local_dir() -> bool:
    try:
        return timm.models.parse_model_name("local-dir:x")[0] == "local-dir"
    except AssertionError:
        return False


def test_the_marker_shows_what_is_executed(marker):
    torch.load(marker.parent / "evil.pth", weights_only=False)
    assert marker.is_dir()


FOREIGN = {
    "checkpoint_path": "{0}/evil.pth",
    "pretrained": True,
    "pretrained_cfg": {"file": "{0}/evil.pth", "custom_load": True},
    "pretrained_cfg_overlay": {"file": "{0}/evil.pth"},
    "pretrained_strict": False,
    "pretrained_filter_fn": "os.system",
    "cache_dir": "{0}",
    "scriptable": True,
    "no_jit": True,
    "model_cls": "os.system",
    "kwargs_filter": ["num_classes"],
    "feature_cfg": {"feature_cls": "fx"},
    "model_name": HOST,
    "imgsize": 32,
}


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "dense"])
@pytest.mark.parametrize("name", FOREIGN)
def test_other_arguments_are_refused_by_name(saved, tmp_path, marker, monkeypatch, name, patched):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    saved(patched)
    value = json.loads(json.dumps(FOREIGN[name]).replace("{0}", tmp_path.as_posix()))
    edit(tmp_path / "m", "model_args", **{name: value})
    ways = [
        lambda: vt.load(tmp_path / "m"),
        lambda: vt.load(f"local-dir:{tmp_path / 'm'}"),
        lambda: vt.load(tmp_path / "m", num_classes=5),
    ]
    if has_local_dir():
        ways.append(lambda: create_host(ModelConfig(name=f"local-dir:{tmp_path / 'm'}", pretrained=True)))
    for way in ways:
        with pytest.raises(vt.CheckpointError, match=f"model_args.{name}: .* may set only the model's own") as caught:
            way()
        assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.skipif(not has_local_dir(), reason="this timm has no local-dir: models")
@pytest.mark.parametrize("name", ["checkpoint_path", "scriptable", "model_cls", "imgsize"])
def test_timms_create_model_refuses_the_same_arguments(saved, tmp_path, marker, name):
    saved()
    value = json.loads(json.dumps(FOREIGN[name]).replace("{0}", tmp_path.as_posix()))
    assert timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True) is not None
    edit(tmp_path / "m", "model_args", **{name: value})
    with pytest.raises((vt.CheckpointError, TypeError), match=name):
        timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    assert not marker.exists()


@pytest.mark.parametrize("host", ["vit_tucker_patched", "local-dir:{0}", "os.system", None, 3])
def test_hosts_are_names_of_timm(saved, tmp_path, marker, host):
    saved()
    edit(tmp_path / "m", "model_args", host=host.replace("{0}", str(tmp_path / "m")) if isinstance(host, str) else host)
    with pytest.raises(vt.CheckpointError) as caught:
        vt.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "dense"])
def test_sources_of_other_weights_are_ignored(saved, tmp_path, marker, monkeypatch, patched):
    """pretrained_cfg may name a file or an address: the weights are those of the folder, and the model forgets the rest."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    model = saved(patched)
    evil = str(tmp_path / "evil.pth")
    sources = {
        "file": evil,
        "url": f"file://{evil}",
        "hf_hub_id": "me/evil",
        "hf_hub_filename": "evil.pth",
        "source": "file",
    }
    edit(tmp_path / "m", "pretrained_cfg", **sources, custom_load=True)
    loaded = vt.load(tmp_path / "m")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))
    assert not any(loaded.pretrained_cfg.get(name) for name in (*sources, "custom_load", "state_dict"))
    edit(tmp_path / "m", "pretrained_cfg", state_dict={"head.weight": [1.0]})
    assert torch.equal(vt.load(tmp_path / "m")(x), model(x))
    assert not marker.exists()


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "dense"])
def test_pickled_weights_beside_config_json_are_not_executed(saved, tmp_path, marker, monkeypatch, patched):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    saved(patched)
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes((tmp_path / "evil.pth").read_bytes())
    with pytest.raises(vt.CheckpointError, match="pytorch_model.bin"):
        vt.load(tmp_path / "m")
    host = ModelConfig(name=HOST, checkpoint=str(tmp_path / "m"), **SMALL)
    with pytest.raises(vt.CheckpointError, match="Python objects besides tensors"):
        create_host(host)
    if has_local_dir():
        with pytest.raises((vt.CheckpointError, vt.ConfigError)):
            create_host(ModelConfig(name=f"local-dir:{tmp_path / 'm'}", pretrained=True))
    assert not marker.exists()


def test_overrides_of_load_may_be_any_argument(saved, tmp_path):
    """Overrides of ``load`` are code, not data; and what says where things are does not get into a folder."""
    saved()
    assert vt.load(tmp_path / "m", img_size=32, drop_path_rate=0.1, scriptable=True).patch_embed.img_size == (32, 32)
    assert own_arguments({**SMALL, "cache_dir": "x", "checkpoint_path": "y"}) == SMALL
    with pytest.raises(vt.CheckpointError, match="model_args.cache_dir"):
        vt.save(timm.create_model(HOST, **SMALL), tmp_path / "n", model_args={**SMALL, "cache_dir": "x"})


def test_constructor_arguments_of_timms_models_are_allowed():
    """The fields of our own config that name arguments, for kinds of hosts with constructors of their own."""
    for host in (HOST, "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224", "vit_relpos_small_patch16_224"):
        assert set(SMALL) - {"num_classes"} <= allowed_names(host), host
    assert {"window_size", "depths", "embed_dim"} <= allowed_names("swin_tiny_patch4_window7_224")
    assert {"rel_pos_type", "dim_head", "stem_width"} <= allowed_names("coatnet_0_rw_224")  # of a config class
